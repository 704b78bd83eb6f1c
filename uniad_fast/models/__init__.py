"""Networks: modules and parameters; never an image, never a file of a user's."""
