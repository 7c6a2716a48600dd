"""Side-by-side timings: this project's encoder, training and inference against `segment_anything`'s and others'."""
