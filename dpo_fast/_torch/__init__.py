"""The torch side below the public functions: operators, their devices and their autograd."""
