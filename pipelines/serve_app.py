"""The HTTP service as an application of Ray Serve, which is what a RayService of KubeRay deploys.

`cbir serve` needs none of this: it answers from one process. Here Ray Serve starts the replicas of the service, spreads
the requests over them and replaces those that die; each replica has a query pool of its own on the same cluster.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve

from pipelines.query_pool import QueryPool
from pipelines.serve import read_token
from pipelines.service import Service, Settings
from pipelines.work import limit_threads

__all__ = ["Arguments", "Ingress", "application"]

serve: Any = ray_serve
"""Ray Serve without its types, which do not know what a deployment's decorator makes of a class."""


class Arguments(BaseModel):
    """The `args` of the application in Serve's configuration: what `cbir serve` takes as options."""

    model_config = ConfigDict(extra="forbid")

    store: str = Field(description="The store whose published version answers: a folder or s3:// URI.")
    actors: int = Field(1, ge=1, description="Processes that share the partitions, for each replica of the service.")
    replicas: int = Field(1, ge=1, description="How many times each share is held: with 2, one may die.")
    deadline: float = Field(10.0, gt=0, description="Seconds for a query; late partitions are left out.")
    max_megabytes: float = Field(20.0, gt=0, description="Largest body.")
    poll: float = Field(5.0, gt=0, description="Seconds between looks for a newer published version.")
    verify: bool = Field(True, description="Compare every file with its sha256 before it is served.")


class Ingress:
    """A replica of the service. The bearer token comes from the environment, as for `cbir serve`."""

    def __init__(self, arguments: Arguments) -> None:
        limit_threads()
        settings = Settings(
            arguments.deadline, round(arguments.max_megabytes * 1e6), arguments.poll, read_token(file=None)
        )
        self._pool = QueryPool(arguments.store, arguments.actors, replicas=arguments.replicas, verify=arguments.verify)
        self._service = Service(self._pool, settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve asks for, once the replica is made."""
        return self._service.app

    def __del__(self) -> None:
        self._pool.close()


def application(arguments: Arguments) -> Any:
    """The application, which Serve's configuration names in `import_path`: `pipelines.serve_app:application`."""
    deployment = serve.deployment(name="Service", max_ongoing_requests=256)
    return deployment(serve.ingress()(Ingress)).bind(arguments)
