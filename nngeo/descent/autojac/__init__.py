"""Jacobians of several losses, accumulated in `.jac`, returned, or combined into `.grad`."""

from nngeo.descent.autojac.backward import backward
from nngeo.descent.autojac.jac import jac
from nngeo.descent.autojac.jac_to_grad import jac_to_grad
from nngeo.descent.autojac.mtl_backward import mtl_backward

__all__ = ["backward", "jac", "jac_to_grad", "mtl_backward"]
