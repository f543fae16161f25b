"""The data-set card."""

from __future__ import annotations


def card(counts: dict[str, int], train_tools: int, held_tools: int, seed: int) -> str:
    """README.md of the sample set.

    Args:
        counts: rows of each `task/split`.
        train_tools, held_tools: different tools that the rows of each side offer.
        seed: what the rows were drawn with.
    """
    table = "\n".join(
        f"| {task} | {counts[f'{task}/train']} | {counts[f'{task}/heldout']} |"
        for task in ("tool_calling", "math", "code")
    )
    return f"""---
license: apache-2.0
language: [en]
task_categories: [text-generation]
tags: [tool-calling, synthetic]
pretty_name: prefillshare-train sample set
---

# Sample set

Self-made conversations for the demo and the tests, written by
`python data/generate.py --seed {seed}`; a seed gives the same bytes every time, and `--check`
compares.

| task | train | heldout |
|---|---|---|
{table}

- `tool_calling`: `messages` and `tools`, in the form of the OpenAI chat API. Tools are composed
  from catalogues of things, verbs and argument kits: {train_tools} of them in training,
  {held_tools} others in the held-out part. No held-out tool appears in training, called or
  offered. A row offers its tool among neighbours of the same field. Some requests need two calls,
  some none of the tools, some a second turn. Every argument is said in the request.
- `math`: word problems with worked steps and a last line `#### N`; `answer` was computed apart
  from the steps.
- `code`: one-expression Python functions; `examples` holds inputs and outputs of a real run, as
  JSON text.

The split: held-out tools are whole tools, the last thing of every field and some whole fields. The
held-out questions of `math` and `code` are other questions from the same patterns as in training,
which is easier than unseen kinds of question.

Limits: sentences are composed, so they are regular and their English is plain. The set shows that
training works and lets tests run offline. It says nothing about quality on real requests, and no
number measured on it should be quoted as such.
"""
