"""``zolightning bench``: time and memory of a step, beside two forwards, published MeZO and backprop, in one run."""
