"""
What the papers say of LoRA, tested. bench/claims.py is the command; read in this order:

    arms.py         what is tuned and how (an Arm), and how large everything is (a Scale)
    machine.py      one model and its training step, used for many runs
    laboratory.py   runs that are kept, sweeps over the learning rate, bases, texts
    claim.py        what a claim is, and the verdicts
    rates.py ranks.py layers.py weights.py forgetting.py bases.py
                    the claims: sentence, source, threshold, experiment and judge, one class each
    spectra.py      what the claims about weights measure
    page.py         docs/claims.md and its figures, from the results
"""
