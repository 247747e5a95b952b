"""What the paper's experiments need: data, recipes, metrics and evaluations.

Source: Shoeybi et al. 2019, arXiv:1909.08053, sections 4 and 5.
"""
