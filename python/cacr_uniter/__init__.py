"""Fine-tuning of UNITER with congruence regularisation: model, data, training, evaluation, analysis and the `cacr`
command.

Importing this package loads nothing else; every part is imported where it is used.
"""
