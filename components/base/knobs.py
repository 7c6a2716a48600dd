"""What the names of knobs say of them."""

PATH_ENDINGS = ("_dir", "_path", "_root", "_checkpoint")  # a knob so named is a path
