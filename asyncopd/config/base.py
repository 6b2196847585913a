"""The base of every configuration section, and sections of which there are several kinds, chosen by `name`."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema


class Frozen(BaseModel):
    """Immutable, unknown keys refused, field docstrings are the schema's descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON: equal settings, equal digest."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class Named(Frozen):
    """Base of the kinds of a section: unknown options are refused with the nearest valid one."""

    name: str
    """Which kind it is; a kind overrides it with a Literal and its default."""

    @model_validator(mode="before")
    @classmethod
    def _options_exist(cls, values: Any) -> Any:
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, Mapping) else []
        if unknown:
            options = [option for option in cls.model_fields if option != "name"]
            near = difflib.get_close_matches(str(unknown[0]), options, n=1, cutoff=0.0)
            raise ValueError(
                f"{cls.model_fields['name'].default} has no option {unknown[0]!r}. "
                + (f"Nearest: {near[0]!r}; all: {', '.join(options)}." if near else "It has no options.")
            )
        return values


Kind = TypeVar("Kind", bound=Named)


class Kinds:
    """The kinds of one section by name. As an annotation it makes pydantic parse a section as the kind it names.

    Looked up at every validation rather than compiled into RunConfig: a kind that a notebook or a test adds counts at
    once.

        CORRECTIONS = Kinds("correction")

        @CORRECTIONS.add
        class Clip(CorrectionSettings): ...

        correction: Annotated[CorrectionSettings, CORRECTIONS]
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._by_name: dict[str, type[Named]] = {}

    def add(self, kind: type[Kind]) -> type[Kind]:
        """Class decorator: sections with this name are of this kind.

        Raises:
            ValueError: the name is taken.
        """
        name = kind.model_fields["name"].default
        if name in self._by_name:
            raise ValueError(f"{self._what} {name!r} is taken by {self._by_name[name].__name__}; choose another name.")
        self._by_name[name] = kind
        return kind

    def __iter__(self) -> Iterator[type[Named]]:
        """The kinds, in the order in which they were added."""
        return iter(self._by_name.values())

    def _parse(self, value: Any) -> Named:
        if isinstance(value, Named) and type(value) in self._by_name.values():
            return value
        names = list(self._by_name)
        if not isinstance(value, Mapping):
            raise ValueError(f"{self._what}: expected a section with a `name`, found {value!r}.")
        if "name" not in value:
            raise ValueError(f"{self._what}: `name` is missing. It may be {', '.join(names)}.")
        if value["name"] not in names:
            near = difflib.get_close_matches(str(value["name"]), names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"no {self._what} is called {value['name']!r}. Nearest: {near!r}; all: {', '.join(names)}."
            )
        return self._by_name[value["name"]].model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        # `any`: dumped as the kind it is, not as the base that the annotation names.
        return core_schema.no_info_plain_validator_function(
            self._parse, serialization=core_schema.simple_ser_schema("any")
        )

    def __get_pydantic_json_schema__(self, _: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kinds = {name: kind.__pydantic_core_schema__ for name, kind in self._by_name.items()}
        return handler(core_schema.tagged_union_schema(kinds, discriminator="name"))
