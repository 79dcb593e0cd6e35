"""Our side of the benchmark with separate rows: no pair shares its prompt or a response.

Beside `ours.py`, it shows what the shared layout alone brings.
"""

from experiments.benchmark import ours

if __name__ == "__main__":
    ours.main(share=False)
