"""One file per evaluator behind one Protocol."""
