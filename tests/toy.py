"""A made-up corpus and flags with which every stage of a run takes a second."""

import json
import random
from pathlib import Path
from string import ascii_lowercase

# fmt: off
TOY = [
    "--vocab", "400", "--width", "32", "--heads", "2", "--feed_forward", "64", "--encoder_blocks", "1", "--M", "3",
    "--K", "16", "--rq_pseudo", "2", "--dense_warmup_steps", "5", "--dense_steps", "3", "--dense_batch", "16",
    "--dense_pseudo", "1", "--negatives", "5", "--d0_steps", "30", "--d0_batch", "32", "--d0_fragments", "2",
    "--steps", "6", "--batch", "16", "--lora_rank", "4", "--pseudo_per_document", "4", "--dream_batch", "32",
]
# fmt: on


def toy_folder(path: Path, documents: int = 50) -> Path:
    """A BEIR folder whose documents each have words of their own and words that all share."""
    rng = random.Random(0)
    shared = [f"common{letter}" for letter in ascii_lowercase[:20]]
    (path / "qrels").mkdir(parents=True)
    corpus, queries, labels = [], [], {"train": [], "test": []}
    for i in range(documents):
        own = [
            "".join(rng.choices("bcdfglmnprstv", k=2))
            + rng.choice("aeiou")
            + ascii_lowercase[i % 26]
            + letter
            for letter in "abcdef"
        ]
        text = " ".join(rng.sample(own * 2 + rng.sample(shared, 8), 20))
        corpus.append({"_id": f"d{i}", "title": own[0], "text": text})
        for split in labels:
            queries.append({"_id": f"{split}{i}", "text": " ".join(rng.sample(own, 3))})
            labels[split].append(f"{split}{i}\td{i}\t1")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, rows in labels.items():
        (path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows))
    return path
