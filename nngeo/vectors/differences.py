"""How two LayerCollections differ, in words."""

from __future__ import annotations

from collections.abc import Iterable

from nngeo.layers.collection import Layer, LayerCollection


def differences(left: LayerCollection, right: LayerCollection, left_is: str, right_is: str) -> str:
    """How two collections differ, and what would bring them together; for error messages."""
    common = [name for name in left if name in right]
    only_left, only_right = [n for n in left if n not in right], [n for n in right if n not in left]
    differing = [n for n in common if left[n] != right[n]]
    found = []
    if only_left:
        found.append(f"only {left_is} has {listed(only_left)}")
    if only_right:
        found.append(f"only {right_is} has {listed(only_right)}")
    for n in differing[:3]:
        found.append(f"layer {n!r} is {described(left[n])} in {left_is} and {described(right[n])} in {right_is}")
    if not found:
        found.append("they have the same layers in different orders")
    advice = "Make both with one LayerCollection."
    if not differing:
        advice = (
            "Bring one to the other's collection with .restrict(collection) or .embed(collection) (zeros elsewhere)."
        )
    return f"{'; '.join(found)}. {advice}"


def described(layer: Layer) -> str:
    """The kind and shapes of a layer."""
    return f"{layer.kind} ({', '.join(f'{local} {tuple(shape)}' for local, shape in layer.shapes.items())})"


def listed(names: Iterable[str]) -> str:
    """The first few of the names."""
    shown = [repr(name) for name in names]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return (", ".join(shown[:6]) or "nothing") + more
