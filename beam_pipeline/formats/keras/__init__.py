"""`.keras` files of Keras 3 and 2."""
