"""Per-example products with vectors and with columns, for every kind of module: J v, J' w, J M, M J, J."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nngeo import LayerCollection, PVector
from nngeo.products import jacobian, jmp, jvp, mjp, vjp
from tests import reference_products as reference
from tests.modules import named
from tests.product_settings import Setting, draw, exact, setting, settings

every = pytest.mark.parametrize("at", settings(), ids=lambda at: at.id)
some = pytest.mark.parametrize(
    "at", settings("linear", "conv2d_groups", "layer_norm", "lstm", "two_inputs", "decoder"), ids=lambda at: at.id
)


def shaped(at: Setting, v: Tensor) -> list[Tensor]:
    """(b, n) in the shape of the only tensor that the outputs are differentiated by, where there is one."""
    if at.wrt == "weight" or len(at.sizes) != 1:
        return []
    (name,) = at.sizes
    return [v.reshape(reference.arguments(at.model, at.x)[name].shape)]


# ------------------------------------------------------------------------------------------ definitions


@every
def test_jacobian_is_its_rows(at):
    exact(jacobian(at.model, at.x, at.wrt), at.J)


@every
def test_jvp_is_the_jacobian_times_a_vector(at):
    v = draw(3, at.J.shape[-1])
    expected = (at.J @ v[..., None])[..., 0]
    found = [jvp(at.model, at.x, same, at.wrt) for same in (v, *shaped(at, v))]
    exact(found, [expected] * len(found))


@every
def test_vjp_is_the_transposed_jacobian_times_a_vector(at):
    w = draw(3, at.J.shape[1])
    expected = (w[:, None] @ at.J)[:, 0]
    exact([vjp(at.model, at.x, same, at.wrt) for same in (w, w.reshape(3, *at.outputs))], [expected] * 2)


@every
def test_jmp_is_the_jacobian_times_columns(at):
    m = draw(3, at.J.shape[-1], 2)
    exact(jmp(at.model, at.x, m, at.wrt), at.J @ m)


@every
def test_mjp_is_rows_times_the_jacobian(at):
    m = draw(3, 2, at.J.shape[1])
    exact(mjp(at.model, at.x, m, at.wrt), m @ at.J)


# ------------------------------------------------------------------------------------------ forms of arguments


@some
def test_columns_and_rows_are_the_identity_by_default(at):
    exact([jmp(at.model, at.x, None, at.wrt), mjp(at.model, at.x, None, at.wrt)], [at.J] * 2)


@some
def test_a_vector_without_a_batch_axis_is_shared_by_the_examples(at):
    v, w = draw(at.J.shape[-1]), draw(at.J.shape[1])
    found = jvp(at.model, at.x, v, at.wrt), vjp(at.model, at.x, w, at.wrt)
    exact(found, (at.J @ v, w @ at.J))


@some
def test_columns_and_rows_without_a_batch_axis_are_shared_by_the_examples(at):
    columns, rows = draw(at.J.shape[-1], 4), draw(4, at.J.shape[1])
    found = jmp(at.model, at.x, columns, at.wrt), mjp(at.model, at.x, rows, at.wrt)
    exact(found, (at.J @ columns, rows @ at.J))


@some
def test_more_columns_than_coordinates_are_allowed(at):
    o, n = at.J.shape[1:]
    found = jmp(at.model, at.x, draw(n, n + 3), at.wrt), mjp(at.model, at.x, draw(o + 3, o), at.wrt)
    exact(found, (at.J @ draw(n, n + 3), draw(o + 3, o) @ at.J))


@some
def test_the_plural_means_the_same(at):
    plural = {"input": "inputs", "weight": "weights"}.get(at.wrt, at.wrt)
    exact(jacobian(at.model, at.x, plural), at.J)


@pytest.mark.parametrize("b", [1, 5])
@some
def test_any_number_of_examples_will_do(at, b):
    x = at.module.inputs(b, seed=2)
    exact(jacobian(at.model, x, at.wrt), reference.jacobian(at.model, x, at.wrt))


@some
def test_an_example_does_not_depend_on_the_others(at):
    alone = [jacobian(at.model, reference._cut(at.x, i), at.wrt) for i in range(3)]
    exact(jacobian(at.model, at.x, at.wrt), torch.cat(alone))


@pytest.mark.parametrize("at", settings("linear", "layer_norm", "two_inputs", "options"), ids=lambda at: at.id)
def test_one_argument_comes_as_a_tensor_a_tuple_or_a_dict(at):
    x = reference.arguments(at.model, at.x)
    exact([jacobian(at.model, given, at.wrt) for given in (tuple(x.values()), x)], [at.J] * 2)


@pytest.mark.parametrize("wrt", ["left", "right", ("left", "right"), ("right", "left"), ["right"]], ids=str)
def test_inputs_are_concatenated_in_the_order_of_their_names(wrt):
    at = setting("two_inputs", "left")
    parts = {name: setting("two_inputs", name).J for name in ("left", "right")}
    names = [wrt] if isinstance(wrt, str) else wrt
    exact(jacobian(at.model, at.x, wrt), torch.cat([parts[name] for name in names], -1))


@pytest.mark.parametrize("id", ["linear", "batch_norm1d", "tied_linears", "frozen_weights", "vision_transformer"])
@pytest.mark.parametrize("form", ["flat", "by parameter"])
def test_a_pvector_is_a_vector_over_the_weights(id, form):
    at = setting(id, "weight")
    layers = LayerCollection.from_model(at.model)
    v = PVector(layers, vector_repr=draw(layers.numel()))
    given = v if form == "flat" else PVector.from_dict(layers, v.to_dict())
    exact(jvp(at.model, at.x, given, "weight"), at.J @ v.to_torch())


# ------------------------------------------------------------------------------------------ subsets of parameters


def chosen(model: Any, *names: str) -> LayerCollection:
    """Layers in the given order, with their frozen parameters."""
    whole = LayerCollection.from_model(model, frozen=True)
    return LayerCollection([whole[name] for name in names])


SUBSETS = {
    "mlp": [("2",), ("4", "0")],
    "lenet": [("0",), ("3", "6")],
    "layer_norm": [("1", "0")],
    "tied_linears": [("0",), ("2", "0")],
    "vision_transformer": [("", "norm"), ("attend.attend",)],
    "frozen_layers": [("0",), ("4", "2")],
}
PARTS = [(id, names) for id, choices in SUBSETS.items() for names in choices]


@pytest.mark.parametrize("id, names", PARTS, ids=lambda value: "+".join(value) if isinstance(value, tuple) else value)
def test_a_layer_collection_says_which_parameters_in_which_order(id, names):
    (module,) = named(id)
    model, x = module.build(), module.inputs()
    layers = chosen(model, *names)
    twin = module.build().requires_grad_(True)  # a collection may take frozen parameters
    J = reference.jacobian(twin, x, "weight", list(layers.parameters(twin)))
    v, w = draw(3, J.shape[-1]), draw(3, J.shape[1])
    options = {"wrt": "weight", "layer_collection": layers}
    found = {
        "jacobian": jacobian(model, x, **options),
        "jvp": jvp(model, x, v, **options),
        "vjp": vjp(model, x, w, **options),
        "PVector": jvp(model, x, PVector(layers, vector_repr=v[0]), **options),
    }
    expected = {
        "jacobian": J,
        "jvp": (J @ v[..., None])[..., 0],
        "vjp": (w[:, None] @ J)[:, 0],
        "PVector": J @ v[0],
    }
    exact(found, expected)


# ------------------------------------------------------------------------------------------ precision and chunks


@pytest.mark.parametrize("at", settings("linear", "conv2d", "attention", "gru", "dict"), ids=lambda at: at.id)
def test_single_precision_stays_and_suffices(at):
    model = at.module.build().float()
    x = {name: half(value) for name, value in at.x.items()} if isinstance(at.x, dict) else half(at.x)
    v, w = draw(3, at.J.shape[-1]).float(), draw(3, at.J.shape[1]).float()
    found = jvp(model, x, v, at.wrt), vjp(model, x, w, at.wrt), jacobian(model, x, at.wrt)
    J = at.J.float()
    expected = (J @ v[..., None])[..., 0], (w[:, None] @ J)[:, 0], J
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def half(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("budget", [1, 50])
@some
def test_a_budget_does_not_change_the_result(at, budget):
    m, rows = draw(3, at.J.shape[-1], 5), draw(3, 5, at.J.shape[1])
    found = {
        "jacobian": jacobian(at.model, at.x, at.wrt, budget=budget),
        "jmp": jmp(at.model, at.x, m, at.wrt, budget=budget),
        "mjp": mjp(at.model, at.x, rows, at.wrt, budget=budget),
    }
    exact(found, {"jacobian": at.J, "jmp": at.J @ m, "mjp": rows @ at.J})


@some
def test_no_gradient_mode_does_not_matter(at):
    with torch.no_grad():
        exact(jacobian(at.model, at.x, at.wrt), at.J)


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_a_function_picks_one_of_several_outputs(wrt):
    (module,) = named("lstm")
    layer, x = module.build().layer, module.inputs()

    def last(x: Tensor) -> Tensor:
        return layer(x)[1][0][-1]

    exact(jacobian(layer, x, wrt, function=last), reference.jacobian(layer, x, wrt, function=last))
