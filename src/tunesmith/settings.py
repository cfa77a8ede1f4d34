"""The base of every settings class: frozen, closed to unknown keys, documented by attribute."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A part of a run file. The string under a field is its help text everywhere."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )
