"""The CPU runtime: packed weights, the kernels that multiply with them, and the layers that use them."""
