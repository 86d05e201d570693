"""Functions with a rule for forward mode and one for reverse mode.

jax.custom_vjp has no forward mode. jax.custom_jvp gets its reverse mode by transposing the rule for
forward mode, which JAX cannot do for loops whose length depends on the data.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

Arrays = Sequence[Any]
Static, Residuals = TypeVar("Static"), TypeVar("Residuals")


def differentiable(
    function: Callable[..., tuple[jax.Array, ...]],
    *,
    residuals: Callable[[tuple, tuple], Residuals],
    push_forward: Callable[[Static, Residuals, tuple], tuple],
    pull_back: Callable[[Static, Residuals, tuple], tuple],
    num_differentiable: int,
) -> Callable[..., tuple[jax.Array, ...]]:
    """`function(static, *operands)`, differentiable in its first `num_differentiable` operands.

    Both rules are called only when they are needed. First order works in both modes, and forward
    over reverse, as a Hessian-vector product has it; reverse over either does not where rules loop.

    Args:
      function: returns a tuple of arrays; `static` is hashable.
      residuals: of operands and results, what both rules take.
      push_forward: (static, residuals, tangents of the operands) to tangents of the results.
      pull_back: (static, residuals, cotangents of the results) to cotangents of the operands.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def call(static, *operands):
        return function(static, *operands)

    @call.defjvp
    def _(static, operands, tangents):
        results = call(static, *operands)
        kept, tree = jax.tree.flatten(residuals(operands, results))

        def bind_residuals(rule):
            return lambda kept, linear: rule(static, tree.unflatten(kept), tuple(linear))

        rules = _Rules(bind_residuals(push_forward), bind_residuals(pull_back), len(kept))
        out_avals = tuple(jax.typeof(x).to_tangent_aval() for x in results)
        tangents = tangents[:num_differentiable]
        return results, tuple(_linear.bind(*kept, *tangents, rules=rules, out_avals=out_avals))

    return call


def not_differentiable(function: Callable[..., Any], *, reason: str) -> Callable[..., Any]:
    """`function(static, *operands)`, which raises NotImplementedError(reason) under derivatives."""
    call = jax.custom_jvp(function, nondiff_argnums=(0,))

    def refuse(*_) -> NoReturn:
        raise NotImplementedError(reason)

    call.defjvp(refuse)
    return call


@dataclasses.dataclass(frozen=True)
class _Rules:
    """A linear function and its transpose, both of (residuals, linear arguments)."""

    push_forward: Callable[[Arrays, Arrays], Arrays]
    pull_back: Callable[[Arrays, Arrays], Arrays]
    num_residuals: int

    def split(self, arguments: Arrays) -> tuple[list[Any], list[Any]]:
        return list(arguments[: self.num_residuals]), list(arguments[self.num_residuals :])


# jax.custom_derivatives.linear_call is almost this, but it traces the forward rule also where only
# reverse mode runs, cannot be vmapped, and has no second derivative.
_linear = Primitive("linear_with_transpose")
_linear.multiple_results = True


@_linear.def_impl
def _push_forward(*arguments, rules: _Rules, out_avals) -> list[jax.Array]:
    del out_avals
    return list(rules.push_forward(*rules.split(arguments)))


@_linear.def_abstract_eval
def _(*arguments, rules, out_avals):
    del arguments, rules
    return list(out_avals)


mlir.register_lowering(_linear, mlir.lower_fun(_push_forward, multiple_results=True))


def _jvp(primals, tangents, **params):
    """The tangent is linear in the linear arguments, but not in the residuals."""
    rules: _Rules = params["rules"]
    residual_tangents, linear_tangents = rules.split(tangents)
    if all(isinstance(x, ad.Zero) for x in residual_tangents):
        residuals, _ = rules.split(primals)
        linear_tangents = map(ad.instantiate_zeros, linear_tangents)
        return _linear.bind(*primals, **params), _linear.bind(
            *residuals, *linear_tangents, **params
        )
    push_forward = functools.partial(_push_forward, **params)
    return jax.jvp(push_forward, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(cotangents, *arguments, rules: _Rules, out_avals) -> list:
    del out_avals
    residuals, linear = rules.split(arguments)
    found = rules.pull_back(residuals, [ad.instantiate_zeros(x) for x in cotangents])
    # What is no UndefinedPrimal is a tangent known to be zero: nothing depends on it.
    wanted = [
        x if ad.is_undefined_primal(at) else None for x, at in zip(found, linear, strict=True)
    ]
    return [None] * len(residuals) + wanted


def _batch(arguments, dims, *, rules: _Rules, out_avals) -> tuple[list, list]:
    (size,) = {x.shape[d] for x, d in zip(arguments, dims, strict=True) if d is not None}
    (residuals, linear), (residual_dims, linear_dims) = rules.split(arguments), rules.split(dims)
    linear = [batching.bdim_at_front(x, d, size) for x, d in zip(linear, linear_dims, strict=True)]
    axes = residual_dims, 0
    batched = dataclasses.replace(
        rules,
        push_forward=lambda *args: jax.vmap(rules.push_forward, axes, axis_size=size)(*args),
        pull_back=lambda *args: jax.vmap(rules.pull_back, axes, axis_size=size)(*args),
    )
    out_avals = tuple(unmapped_aval(size, 0, aval) for aval in out_avals)
    results = _linear.bind(*residuals, *linear, rules=batched, out_avals=out_avals)
    return results, [0] * len(results)


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
