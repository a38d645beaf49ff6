"""tekfac_edu: learn, trust and use Kronecker-factored natural gradient.

`tekfac_edu.reference`  NumPy, float64: every method written to be read beside its chapter.
`tekfac_edu.optim`  PyTorch: the same methods as optimizers for an existing training loop.
`tekfac_edu.figures`, `tekfac_edu.data`, `tekfac_edu.checks`  what the chapters of the book share.

Importing the package loads none of them.
"""

__version__ = "0.1.0"
