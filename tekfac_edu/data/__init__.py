"""Data sets: small ones that other packages embed, and images through Hugging Face `datasets`.

`digits`, `mnist_5k`  NumPy arrays for the chapters (embedded.py).
`tekfac_edu.data.images`  any of the image sets as uint8 tensors; reads files through hub.py.
`tekfac_edu.data.batches`  shuffling, crops and flips on the device, fixed by a seed.
"""

from tekfac_edu.data.embedded import Digits, digits, mnist_5k

__all__ = ["Digits", "digits", "mnist_5k"]
