"""Evaluation of models that are done: lm-evaluation-harness's tasks, perplexity of texts, comparison, reports."""
