"""Functions that a config FILE names, such as a verifier: a config is stored with their names in their places.

So a stored config brings no code along, and who resumes such a run gives the config file again.
"""

from collections.abc import Callable, Mapping
from typing import Any

from t5x_like.core.errors import UsageError
from t5x_like.rl.verifiers import Named, named


def named_functions(
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Callable[..., Any]], dict[str, Named]]:
    """(the config with the name of each function in its place, {name: function}, {name: where it stands}).

    Raises UsageError for a function that another process could not find.
    """
    functions: dict[str, Callable[..., Any]] = {}
    places: dict[str, Named] = {}

    def look(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: look(item, f"{path}.{key}") for key, item in value.items()}
        if not callable(value):
            return value
        try:
            name, place = named(value)
        except (ValueError, TypeError, OSError) as error:
            raise UsageError(f"{path}: {error}") from None
        functions[name], places[name] = value, place
        return name

    return look(config, "config"), functions, places
