"""A metric of your own: `gate.metrics: {metric:LOW_P: 0.01}` and it is judged as ours are."""

from eaft_prune.maths.metrics import Metric

LOW_P = Metric(
    name="low_p",
    label="p < 1%",
    meaning="Share of tokens that the model gave less than 1%.",
    better="lower",
    per_token=lambda scores: scores.p_T < 0.01,
    burst=0.2,  # no conversation has shown one: the next may have this share of its tokens
)
