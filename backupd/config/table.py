"""The base of all tables of a configuration."""

from pydantic import BaseModel, ConfigDict


class TableModel(BaseModel):
    """A table of the configuration: nothing unknown in it, nothing to change in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
