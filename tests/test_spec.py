import json
import subprocess
import sys
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

import cbir.encoding  # noqa: F401 - a role with several methods
from cbir import spec
from cbir.errors import ConfigError
from cbir.spec import Method, Spec, fingerprint, methods, nearest, one_of, roles


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(spec, "_registry", {role: dict(known) for role, known in spec._registry.items()})


class Brush(Method):
    """A role for these tests."""

    role: ClassVar[str] = "brush"
    paper: ClassVar[str] = "none"


def define_flat(default_width: int = 3) -> type[Brush]:
    class Flat(Brush):
        """A flat brush."""

        name: Literal["flat"] = "flat"
        width: int = Field(default=default_width, ge=1)
        hair: str = "hog"

    return Flat


def define_round() -> type[Brush]:
    class Round(Brush):
        """A round brush."""

        name: Literal["round"] = "round"
        size: int = 1

    return Round


class TestNearest:
    def test_names_the_most_similar_word(self):
        assert nearest("widht", ["hair", "width"]) == "; did you mean 'width'?"

    def test_lists_all_in_order_where_none_is_similar(self):
        assert nearest("zzz", ["width", "hair"]) == "; known are hair, width"


class TestSpec:
    def test_an_unknown_key_is_refused_and_the_nearest_one_named(self):
        with pytest.raises(ValidationError, match="unknown key 'widht'; did you mean 'width'"):
            define_flat()(widht=4)

    def test_an_unknown_key_with_braces_or_of_another_type_is_shown_as_it_is(self):
        with pytest.raises(ValidationError, match=r"unknown key '\{hint\}'"):
            define_flat().model_validate({"{hint}": 1})
        with pytest.raises(ValidationError, match="unknown key '7'"):
            define_flat().model_validate({7: 1})

    def test_a_nested_unknown_key_names_its_path(self):
        class Box(Spec):
            brush: define_flat()

        with pytest.raises(ValidationError) as caught:
            Box.model_validate({"brush": {"name": "flat", "hairs": "x"}})
        (error,) = caught.value.errors()
        assert error["loc"] == ("brush",)
        assert error["msg"] == "unknown key 'hairs'; did you mean 'hair'?"

    def test_it_is_frozen_and_hashable(self):
        flat = define_flat()()
        with pytest.raises(ValidationError, match="frozen"):
            flat.width = 5
        assert hash(flat) == hash(type(flat)())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite_are_refused(self, value):
        class Scale(Spec):
            factor: float = 1.0

        with pytest.raises(ValidationError, match="finite"):
            Scale(factor=value)

    def test_wrong_defaults_are_found(self):
        with pytest.raises(ValidationError, match="greater than or equal to 1"):
            define_flat(default_width=0)()


class TestRegistry:
    def test_defining_a_method_registers_it_in_alphabetical_order(self):
        assert "brush" not in roles()
        made = {"round": define_round(), "flat": define_flat()}
        assert "brush" in roles()
        assert methods("brush") == made
        assert list(methods("brush")) == ["flat", "round"]

    def test_a_role_is_not_a_method_and_an_unknown_role_has_none(self):
        assert methods("brush") == {}
        assert methods("no such role") == {}

    def test_the_answer_is_a_copy(self):
        define_flat()
        methods("brush").clear()
        assert list(methods("brush")) == ["flat"]

    def test_a_second_method_of_the_same_name_is_refused_and_the_first_stays(self):
        first = define_flat()
        with pytest.raises(ConfigError, match="brush 'flat' is registered twice"):

            class Impostor(Brush):
                """Another brush."""

                name: Literal["flat"] = "flat"

        assert methods("brush") == {"flat": first}

    def test_a_subclass_must_have_a_name_of_its_own(self):
        flat = define_flat()
        with pytest.raises(ConfigError, match="registered twice"):

            class Wide(flat):
                """A wide brush."""

    def test_the_same_name_in_two_roles_is_fine(self):
        class Pen(Method):
            """Another role."""

            role: ClassVar[str] = "pen"

        class FlatPen(Pen):
            """A flat pen."""

            name: Literal["flat"] = "flat"

        flat = define_flat()
        assert methods("brush")["flat"] is flat
        assert methods("pen")["flat"] is FlatPen

    def test_reloading_a_module_is_not_a_second_method(self):
        define_flat()
        define_flat()
        assert list(methods("brush")) == ["flat"]


class TestOneOf:
    @pytest.mark.parametrize("define", [[define_flat], [define_flat, define_round]])
    def test_the_name_chooses_the_method(self, define):
        made = [make() for make in define]
        adapter = TypeAdapter(one_of("brush"))
        for cls in made:
            name = cls.model_fields["name"].default
            assert type(adapter.validate_python({"name": name})) is cls

    def test_an_unknown_name_is_refused(self):
        define_flat(), define_round()
        with pytest.raises(ValidationError, match="'flat', 'round'"):
            TypeAdapter(one_of("brush")).validate_python({"name": "felt"})

    def test_a_single_method_refuses_another_name(self):
        define_flat()
        with pytest.raises(ValidationError, match="'flat'"):
            TypeAdapter(one_of("brush")).validate_python({"name": "round"})

    @pytest.mark.parametrize("name", list(methods("encoder")))
    def test_real_methods_have_a_name_a_paper_and_a_schema(self, name):
        cls = methods("encoder")[name]
        assert cls.model_fields["name"].default == name
        assert cls.paper
        assert cls.model_json_schema()["properties"]["name"]["const"] == name


class TestFingerprint:
    def test_is_pinned(self):
        """Stored work lies under such names; another result would orphan it."""
        expected = "8bf8b15d67369b202cf9ced0ee7d1573a27912fcf9ead8af1ca602833a11ca41"
        assert fingerprint({"b": 1, "a": [1.5, None, "é"]}, "x") == expected

    def test_the_order_of_keys_does_not_matter_but_everything_else_does(self):
        assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        different = [("a", "b"), ("b", "a"), ("ab",), (["a", "b"],), ({"a": "b"},), ("a", "b", None), (1,), ("1",), ()]
        assert len({fingerprint(*parts) for parts in different}) == len(different)

    def test_does_not_depend_on_the_process(self):
        code = "from cbir.spec import fingerprint; print(fingerprint({'x': [1, 2.5]}, 'y'))"
        there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert there == fingerprint({"x": [1, 2.5]}, "y")

    def test_refuses_what_json_cannot_hold(self):
        with pytest.raises(TypeError):
            fingerprint({1, 2})

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuses_numbers_that_json_cannot_hold(self, value):
        with pytest.raises(ValueError, match="JSON"):
            fingerprint(value)


class TestIdentity:
    def test_holds_every_field_and_the_version(self):
        assert define_flat()(width=4).identity() == {"name": "flat", "width": 4, "hair": "hog", "version": 1}

    def test_a_default_that_is_written_out_is_the_same_method(self):
        flat = define_flat()
        assert fingerprint(flat().identity()) == fingerprint(flat(width=3).identity())
        assert fingerprint(flat().identity()) != fingerprint(flat(width=4).identity())

    def test_is_json(self):
        flat: Annotated[Any, "a method"] = define_flat()()
        assert json.loads(json.dumps(flat.identity())) == flat.identity()
