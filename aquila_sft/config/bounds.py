"""Limits of numbers, as one line of error."""

from aquila_sft.errors import UserError


def at_least(group: str, values: object, low: float, *names: str) -> None:
    for name in names:
        if getattr(values, name) < low:
            raise UserError(f"{group}.{name}={getattr(values, name)} must be at least {low}")


def within(group: str, values: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(values, name) <= high:
            raise UserError(f"{group}.{name}={getattr(values, name)} is outside {low} … {high}")


def more_than_0(group: str, values: object, *names: str) -> None:
    """null is not set, and passes."""
    for name in names:
        value = getattr(values, name)
        if value is not None and value <= 0:
            raise UserError(f"{group}.{name}={value} must be more than 0")
