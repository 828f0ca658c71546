"""Serve one Mixture-of-Experts base model and many LoRA adapters on its experts.

Dimension legend, used in every docstring, shape comment and kernel of this package:

    M  tokens in the step           R  LoRA rank of an adapter
    K  top_k, experts per token     S  adapter slots resident on the device
    E  experts held by this rank    P  routed pairs = M * K
    H  hidden size                  I  expert intermediate size on this rank

*Adapter* is what a user loads by name; *slot* is where its weights lie on the device (-1 = base model).
*Pair* is one (token, expert) assignment; *group* is all pairs of one (slot, expert).
"""

__version__ = "0.1.0"
