"""Inner problems that are one linear system: their solutions as differentiable functions.

Nothing is approximated and nothing iterates: gradients are exact, through the one Cholesky factor of the forward
pass, with respect to everything that is given (penalties, sample weights, kernel settings, the data itself), and can
be differentiated again. For use inside any ``@ohg.differentiable`` objective, or any other torch function.
"""

from .distillation import kernel_inducing_points
from .kernel_ridge import kernel_ridge, kernel_ridge_k_fold, kernel_ridge_leave_one_out
from .kernels import linear_kernel, polynomial_kernel, rbf_kernel
from .ridge import LinearModel, ridge, ridge_head
from .ridge_held_out import ridge_k_fold, ridge_leave_one_out

__all__ = [
    "LinearModel",
    "kernel_inducing_points",
    "kernel_ridge",
    "kernel_ridge_k_fold",
    "kernel_ridge_leave_one_out",
    "linear_kernel",
    "polynomial_kernel",
    "rbf_kernel",
    "ridge",
    "ridge_head",
    "ridge_k_fold",
    "ridge_leave_one_out",
]
