"""Benchmarks that lm-eval defines: its task files make the prompts and judge the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks._yaml_loader import load_yaml

from prefillshare_train.evaluation.task import EvalItem, EvaluationError, Judged, Verdict

SCORE_FILTER = "flexible-extract"
"""The filter whose result is the score; see `LmEvalTask.notes`."""

_METRIC = "exact_match"
_SEED = 1234  # lm-eval's own, of the examples
_ZERO_SHOT = (
    "Zero-shot chat is scored on lm-eval's flexible-extract, the last number of the answer: "
    "strict-match asks for the form '#### 5', which only few-shot examples would show."
)
_FEW_SHOT = (
    "Plain text with lm-eval's own number of examples, drawn by its own seed; scored on its "
    "flexible-extract, the last number of the answer."
)


def task_folder() -> Path:
    """The folder of task files: in the installed package, or `eval/` of a checkout.

    Raises:
        EvaluationError: neither is there.
    """
    here = Path(__file__).resolve()
    for folder in (here.parent / "task_files", here.parents[3] / "eval"):
        if folder.is_dir():
            return folder
    raise EvaluationError(
        f"there are no task files in {here.parent / 'task_files'}: install prefillshare-train "
        "again, or run from a checkout"
    )


class LmEvalTask:
    """A `generate_until` task of lm-eval, as a benchmark. See `Task`."""

    def __init__(self, name: str, task: Any, settings: dict[str, Any]) -> None:
        """Args: `task` is lm-eval's own object; build one with `from_file`."""
        self.name = name
        self._task = task
        self._filters = [
            build_filter_ensemble(
                entry["name"],
                [
                    (step["function"], {k: v for k, v in step.items() if k != "function"})
                    for step in entry["filter"]
                ],
            )
            for entry in task.config.filter_list
        ]
        self.settings = settings
        form = _FEW_SHOT if settings["shots"] else _ZERO_SHOT
        self.notes = (form, *task.config.metadata.get("notes", ()), *self._out_of_reach())

    @classmethod
    def from_file(
        cls,
        name: str,
        data_dir: Path | str,
        *,
        folder: Path | None = None,
        completion: bool = False,
        max_new_tokens: int | None = None,
    ) -> LmEvalTask:
        """Build a task from its file `NAME_local.yaml`.

        Args:
            name: `gsm8k` or `gsm_plus`.
            data_dir: directory that holds the data file which the task file names.
            folder: of the task files; `task_folder()` where None.
            completion: show the examples that lm-eval shows by default, as plain text, in place of
                zero-shot chat.
            max_new_tokens: the longest answer; the task file's where None.

        Raises:
            EvaluationError: there is no such task, or its data are missing or not what they should
                be.
        """
        folder = folder or task_folder()
        path = folder / f"{name}_local.yaml"
        if not path.is_file():
            known = sorted(file.name.removesuffix("_local.yaml") for file in _task_files(folder))
            raise EvaluationError(
                f"there is no lm-eval task {name!r} in {folder}; there are {', '.join(known)}"
            )
        config = load_yaml(path)
        version = config["metadata"]["version"]
        data_file = config["metadata"]["data_file"]
        config["metadata"]["data_dir"] = str(data_dir)
        examples: dict[str, Any] = {}
        if completion:
            fewshot = config["metadata"]["fewshot"]
            examples = {"file": fewshot.get("file", data_file), "seed": _SEED}
            config["num_fewshot"] = fewshot["shots"]
            config["fewshot_split"] = fewshot["split"]
            config["metadata"]["train_file"] = fewshot.get("file")
        if max_new_tokens is not None:
            config["generation_kwargs"]["max_gen_toks"] = max_new_tokens
        try:
            task = ConfigurableTask(config=config)
        except (OSError, ValueError) as error:
            raise EvaluationError(f"task {name}: {error}") from error
        generation = task.config.generation_kwargs
        settings = {
            "harness": "lm-eval",
            "harness_version": metadata.version("lm_eval"),
            "task_file": path.name,
            "task_version": version,
            "data_file": data_file,
            "data_sha256": _digest(data_dir, data_file),
            "shots": task.config.num_fewshot,
            "prompt_style": "plain text" if completion else "chat: one user message",
            "prompt": task.config.doc_to_text,
            "stop": list(generation["until"]),
            "max_new_tokens": generation["max_gen_toks"],
            "metric": _METRIC,
            "score_filter": SCORE_FILTER,
            "filters": [entry["name"] for entry in task.config.filter_list],
        }
        if examples:
            settings["examples"] = {**examples, "sha256": _digest(data_dir, examples["file"])}
        return cls(name, task, settings)

    def items(self) -> list[EvalItem]:
        """See `Task.items`."""
        self._task.set_fewshot_seed(_SEED)  # examples are drawn item by item, from the start anew
        return [
            EvalItem(
                item_id=f"{self.name}/{index}",
                messages=tuple(self._messages(doc)),
                stop=tuple(self.settings["stop"]),
                max_new_tokens=self.settings["max_new_tokens"],
                reference={"doc": dict(doc)},
            )
            for index, doc in enumerate(self._task.eval_docs)
        ]

    def judge(
        self, items: Sequence[EvalItem], outputs: Sequence[str], judged: Judged
    ) -> list[Verdict]:
        """See `Task.judge`."""
        verdicts = []
        for item, output in zip(items, outputs, strict=True):
            verdicts.append(self._verdict(item.reference["doc"], output))
            judged(item, verdicts[-1])
        return verdicts

    def _messages(self, doc: dict[str, Any]) -> list[dict[str, Any]]:
        """What lm-eval would give to a model's chat template, or its text as one message."""
        shots = self.settings["shots"]
        if shots:
            return [{"role": "user", "content": self._task.fewshot_context(doc, shots)}]
        messages: list[dict[str, Any]] = self._task.fewshot_context(
            doc,
            num_fewshot=0,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=lambda messages, add_generation_prompt: messages,
        )
        return messages

    def _verdict(self, doc: dict[str, Any], output: str) -> Verdict:
        instance = Instance("generate_until", doc, arguments=(), idx=0, resps=[output])
        for ensemble in self._filters:
            ensemble.apply([instance])
        extracted = instance.filtered_resps[SCORE_FILTER]
        if self._task.process_results(doc, [extracted])[_METRIC]:
            return Verdict(True, extracted)
        return Verdict(False, extracted, f"expected {self._gold(doc)}, found {extracted}")

    def _gold(self, doc: dict[str, Any]) -> str:
        target: str = self._task.doc_to_target(doc)
        return target.rsplit("#### ", maxsplit=1)[-1].strip()

    def _out_of_reach(self) -> list[str]:
        """A note on items that the filter fails even where the answer is the reference itself."""
        docs = list(self._task.eval_docs)
        failed = [
            self._gold(doc)
            for doc in docs
            if not self._verdict(doc, self._task.doc_to_target(doc)).correct
        ]
        if not failed:
            return []
        none = failed.count("None")
        return [
            f"{len(failed)} of {len(docs)} items can never be right, since lm-eval's filter finds "
            f"no such answer: {none} have no answer ('None'), {len(failed) - none} have another "
            "that is not one plain number."
        ]


def _digest(data_dir: Path | str, file: str) -> str:
    return hashlib.sha256((Path(data_dir).expanduser() / file).read_bytes()).hexdigest()


def _task_files(folder: Path) -> list[Path]:
    return list(folder.glob("*_local.yaml"))
