"""The main job: three diffusions trained by SVI, their bounds term by term, and their pictures.

    python examples/demo.py

(a) handwritten digits as bits, by binomial diffusion, on held-out images beside what simple density models score;
(b) the Swiss roll, by Gaussian diffusion in 40 steps; (c) the binary heartbeat, by binomial diffusion in 2000 steps.
"""

import time

import binary_digits
import heartbeat
import swiss_roll
from training import output_folder


def main() -> None:
    out, start = output_folder(__doc__), time.perf_counter()
    for title, example in (
        ("(a) handwritten digits, binary, 8 x 8: binomial diffusion", binary_digits),
        ("(b) Swiss roll: Gaussian diffusion", swiss_roll),
        ("(c) binary heartbeat: binomial diffusion", heartbeat),
    ):
        print(f"\n{title}")
        example.main(out)
    print(f"\nall in {time.perf_counter() - start:.0f} s; the pictures are in {out.resolve()}")


if __name__ == "__main__":
    main()
