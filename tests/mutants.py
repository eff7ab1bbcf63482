"""One-line mutants: does a test nearby notice when a line of the program is wrong?

    python -m tests.mutants                     # all; 25 minutes on one core
    python -m tests.mutants retention --list    # those whose file or line contains a word; --list only prints them

Not part of the test suite. Each mutant is made in a temporary copy of the tracked files, and the nearest tests are run
on it. A mutant that survives asks for a test; a line that is not found any more, for a new mutant. Goal: 95 % caught.
"""

# ruff: noqa: E501 (a mutant a line, to be read across)

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.toy import REPO

PACKAGE = "torchtitan_deltaproduct"


class Mutant(NamedTuple):
    """`old`, which stands in `file` once, becomes `new`; pytest is given the words of `tests`."""

    file: str
    old: str
    new: str
    tests: str


OPS, MODELS, DATA, CHECKPOINT, TITAN = (
    f"tests/unit/{room}/" for room in ("ops", "models", "data", "checkpoint", "titan")
)
PARITY, STEP = OPS + "test_parity.py", OPS + "test_custom_op.py"
MUON = "tests/unit/test_optimizers.py"
FOLDERS, MODEL = CHECKPOINT + "test_folders.py", MODELS + "test_model.py"
# fmt: off
MUTANTS = [
    Mutant(*fields)
    for fields in [
        # jobs
        ("jobs.py", "if code == 0 and self.job.is_done():", "if code == 0:", "tests/unit/test_jobs.py"),
        ("jobs.py", "gpus[place % len(gpus)]", "gpus[min(place, len(gpus) - 1)]", "tests/unit/test_jobs.py"),
        ("jobs.py", "if place not in running and waiting:", "if waiting:", "tests/unit/test_jobs.py"),
        ("jobs.py", "            signal.signal(number, lambda received, frame: None)\n", "            pass\n", "tests/unit/test_jobs.py"),
        # launches
        ("events.py", 'own["torchrun"] == one.get("torchrun") and', "False and", "tests/unit/test_events.py"),
        ("titan/checkpointer.py", "            self.exclude_from_loading = []\n", "", "tests/dist/test_resume.py -k begins_anew"),
        ("titan/records.py", "own = max(earlier", "own = min(earlier", "tests/dist/test_resume.py -k try_out"),
        ("events.py", "and own[restart] > (before", "and own[restart] >= (before", "tests/unit/test_events.py"),
        ("titan/run.py", "            config.checkpoint.load_step = -1\n", "            pass\n", "tests/dist/test_resume.py -k loaded_once"),
        ("titan/trainer.py", "        self.optimizers.zero_grad()\n        limit", "        limit", "tests/dist/test_non_finite.py"),
        ("errors.py", "error on rank {rank}: {error}", "{error}", "tests/unit/test_arguments.py"),
        # ops
        ("ops/triton/local.py", 'mask=valid_t, other=float("-inf"))', "mask=valid_t, other=0.0)", OPS + "test_triton.py -k interpreted"),
        ("ops/flops.py", "return 2 * _forward_flops(q, k, do)", "return 2 * _forward_flops(q, k, q)", STEP),
        ("ops/launch.py", "kinds += (x.dtype, x.data_ptr() & 15) if", "kinds += (x.dtype, 0) if", OPS + "test_launch.py"),
        ("ops/launch.py", "compiled[(*grid, 1, 1)](*arguments, *constants)", "compiled[(*grid, 1, 1)](*arguments, *constants[::-1])", OPS + "test_launch.py"),
        ("memory.py", "return (layers - 1) * _kept_products(config) + everything", "return layers * block_input + everything", "tests/unit/test_plan.py"),
        ("ops/recurrent.py", "decay = None if g is None else g.to(dtype).exp()", "decay = None if g is None else (-g).to(dtype).exp()", PARITY),
        ("ops/recurrent.py", "for row in range(t * n, (t + 1) * n):", "for row in reversed(range(t * n, (t + 1) * n)):", PARITY),
        ("ops/recurrent.py", "o = torch.bmm(qc.reshape(batch * heads, 1, dim_k), flat).mul_(scale)", "o = torch.bmm(qc.reshape(batch * heads, 1, dim_k), flat)", f"{PARITY} {MODELS}test_decode.py"),
        ("ops/recurrent.py", "state = torch.where((positions[:, t] == 0)[:, None, None, None], 0.0, state)", "state = torch.where((positions[:, t] == 1)[:, None, None, None], 0.0, state)", PARITY),
        ("ops/normalize.py", "over = (product > 2) & (product <= 2 * (1 + ROUNDING))", "over = product > 2 * (1 + ROUNDING)", OPS + "test_precision.py"),
        ("ops/normalize.py", "return q, k, beta.float() * ratio", "return q, k, beta.float()", OPS + "test_precision.py"),
        ("ops/normalize.py", "return ((dy - y * (y * dy).sum(-1, keepdim=True)) * rstd).to(x.dtype)", "return (dy * rstd).to(x.dtype)", OPS),
        ("ops/segment.py", "keys, queries = row[:, None] > row, row[n - 1 :: n, None] >= row", "keys, queries = row[:, None] > row, row[n - 1 :: n, None] > row", PARITY),
        ("ops/segment.py", "since = since.clamp_(min=MIN_LOG_DECAY).cumsum(-1)", "since = since.clamp_(min=-1.0).cumsum(-1)", PARITY),
        ("ops/segment.py", "dbeta = torch.linalg.vecdot(dwritten, errors).unsqueeze(-1)", "dbeta = torch.linalg.vecdot(dwritten, written).unsqueeze(-1)", PARITY),
        ("ops/segment.py", "across = across * (entering == leaving)", "across = across * 1.0", PARITY),
        ("ops/segment.py", "before[:, :, 0] = 0", "pass", PARITY),
        ("ops/segment.py", "earlier = written.cumsum(-1) - written", "earlier = written.cumsum(-1)", PARITY),
        ("ops/chunk.py", "segment.from_chunks(reads.mul_(parts.scale), o[:, tokens])", "segment.from_chunks(reads, o[:, tokens])", PARITY),
        # models
        ("models/mixer.py", "beta = beta * 2", "beta = beta * 1", MODEL + " " + MODELS + "test_hf_names.py"),
        ("models/mixer.py", "return torch.stack([-self.A_log.exp(), self.dt_bias])", "return torch.stack([-self.A_log, self.dt_bias])", MODEL + " " + MODELS + "test_hf_names.py"),
        ("models/mixer.py", "o = o * F.silu(self.g_proj(x))", "o = o * self.g_proj(x).sigmoid()", MODEL + " " + MODELS + "test_hf_names.py"),
        ("models/conv.py", "tap = tap * (positions >= back).unsqueeze(-1)", "tap = tap * (positions > back).unsqueeze(-1)", MODELS + "test_conv.py"),
        ("models/conv.py", "return F.silu(y).to(x.dtype).unsqueeze(1), window[:, :, 1:].to(cache.dtype).contiguous()", "return F.silu(y).to(x.dtype).unsqueeze(1), window[:, :, :-1].to(cache.dtype).contiguous()", MODELS + "test_conv.py"),
        ("models/conv.py", "y, padded[:, x.shape[1] :].transpose(1, 2)", "y, padded[:, : -x.shape[1]].transpose(1, 2)", MODELS + "test_conv.py"),
        ("models/model.py", "torch.where(document_starts, index, 0).cummax(1).values", "torch.where(document_starts, index, 0)", MODEL),
        ("models/init.py", "digest = hashlib.sha256(f\"{seed}:{name}\".encode()).digest()", "digest = hashlib.sha256(f\"{seed}\".encode()).digest()", MODELS + "test_init.py"),
        ("models/init.py", "return step + torch.log(-torch.expm1(-step))", "return step", MODELS + "test_init.py"),
        ("models/init.py", "return rows // args.num_householder if module in", "return rows if module in", MODELS + "test_init.py"),
        ("models/counts.py", "return 3 * forward_flops_per_token(args)", "return 2 * forward_flops_per_token(args)", MODELS + "test_counts.py"),
        ("models/counts.py", "state = 4 * args.num_heads * args.head_dim * args.head_v_dim", "state = 2 * args.num_heads * args.head_dim * args.head_v_dim", MODELS + "test_decode.py"),
        ("models/loss.py", "kept = labels[rows] != IGNORE_INDEX", "kept = labels[rows] >= IGNORE_INDEX", MODELS + "test_loss.py"),
        ("models/loss.py", "of_target.exp() / total - 1", "of_target.exp() / total", MODELS + "test_loss.py"),
        ("models/loss.py", "largest = scores.amax(1, keepdim=True)", "largest = scores.amin(1, keepdim=True)", MODELS + "test_loss.py"),
        # data
        ("data/packing.py", "count = stream.read(first - 1, row)", "count = stream.read(first, row)", DATA + "test_packing.py"),
        ("data/packing.py", "labels[count - 1 :] = IGNORE", "labels[count:] = IGNORE", DATA + "test_packing.py " + DATA + "test_held_out.py"),
        ("data/packing.py", "starts[0] = True", "pass", DATA + "test_packing.py"),
        ("data/loader.py", "first = sample + self.dp_rank * self.local_batch_size", "first = sample", DATA + "test_loader.py"),
        ("data/loader.py", "self.sample += self.geometry.micro_batch", "self.sample += self.geometry.local_batch_size", DATA + "test_loader.py"),
        ("data/held_out.py", "labels[max(0, self.samples - first) :] = IGNORE", "pass", DATA + "test_held_out.py"),
        ("data/held_out.py", "return -(-self.samples // (self.local_batch_size * self.dp_world_size))", "return self.samples // (self.local_batch_size * self.dp_world_size)", DATA + "test_held_out.py"),
        ("data/held_out.py", "return torch.from_numpy(table * (text_bytes / (table @ counts)))", "return torch.from_numpy(table)", DATA + "test_held_out.py"),
        ("data/held_out.py", "self.read(samples * self.bounds[-1] // self.samples)", "self.read(samples)", DATA + "test_held_out.py"),
        ("data/shards/order.py", "by_remainder[: PERIOD - sum(counts)]", "by_remainder[:0]", DATA + "test_order.py"),
        ("data/shards/order.py", "permutation = _permutation(int(self.sizes[s]), self.seed, s, e)", "permutation = _permutation(int(self.sizes[s]), self.seed, s, 0)", DATA + "test_order.py"),
        ("data/shards/manifest.py", "if hashlib.sha256(table).hexdigest() != digest:", "if False:", DATA + "test_manifest.py"),
        ("data/shards/manifest.py", "parts = [self.dtype, self.eos_id, self.tokenizer_sha256]", "parts = [self.dtype, self.tokenizer_sha256]", DATA + "test_manifest.py"),
        ("data/shards/megatron.py", "(stops - lengths) * itemsize", "stops * itemsize", DATA + "test_corpora.py"),
        ("data/shards/corpora.py", "return starts + np.arange(first, last) * bool(self.inserts[shard])", "return starts", DATA + "test_corpora.py"),
        ("data/shards/corpora.py", "if len(glued := np.setdiff1d(starts, after_separators)):", "if False:", DATA + "test_corpora.py"),
        ("data/counter.py", "return mix(mix((counter * _GOLDEN) ^ key[0]) + key[1])", "return mix(mix((counter * _GOLDEN) ^ key[0]))", DATA + "test_group_word.py " + DATA + "test_formal.py"),
        ("data/generated/languages.py", "negative = size >= 3, size % 2 == 0", "negative = size >= 2, size % 2 == 0", DATA + "test_formal.py"),
        ("data/generated/groups.py", "inversions % 2 == 0", "inversions % 2 == 1", DATA + "test_groups.py"),
        # checkpoint
        ("checkpoint/folders.py", "elif place <= keep_latest_k:", "elif place < keep_latest_k:", FOLDERS),
        ("checkpoint/folders.py", "step % keep_every == 0:", "step % keep_every == 1:", FOLDERS),
        ("checkpoint/folders.py", "    (path / SAVING).touch()\n    (path / MARKER).unlink(missing_ok=True)", "    (path / SAVING).touch()", FOLDERS),
        ("checkpoint/folders.py", "    retire(path)\n    for child", "    for child", FOLDERS),
        ("checkpoint/folders.py", "return is_there(path / SAVING) and not is_there(path / MARKER)", "return not is_there(path / MARKER)", FOLDERS),
        ("checkpoint/folders.py", "if not info.path.is_symlink()", "if True", FOLDERS),
        ("checkpoint/folders.py", "        if step in best:", "        if step not in kept and step in best and place < 3:", FOLDERS),
        ("checkpoint/folders.py", "elif always_kept and not self.keep_best and complete", "elif always_kept and complete", FOLDERS),
        ("checkpoint/marker.py", "if loss is not None and math.isfinite(loss) else None", "if loss is not None else None", FOLDERS),
        ("checkpoint/marker.py", "(folder / SAVING).unlink(missing_ok=True)", "pass", f"{FOLDERS} {CHECKPOINT}test_commands.py"),
        ("checkpoint/marker.py", "if (now := status.st_size) != size:", "if (now := status.st_size) < size:", FOLDERS),
        ("checkpoint/marker.py", "sorted(marker.files)[share::shares]", "sorted(marker.files)[share + 1 :: shares]", FOLDERS),
        ("checkpoint/writer.py", "        super().finish(metadata, results)\n        folder = Path(self.path)\n", "        folder = Path(self.path)\n        write_marker(folder, Marker(self.about.step, 0.0, 1, '', {INDEX: (0, '')}))\n        super().finish(metadata, results)\n", FOLDERS),
        ("checkpoint/safe_dcp.py", "return numbers == math.prod(entry.size) and", "return", CHECKPOINT + "test_safe_dcp.py"),
        ("checkpoint/staging.py", "offset = -(-slot.end // ALIGNMENT) * ALIGNMENT", "offset = slot.end - 1", CHECKPOINT + "test_staging.py"),
        # titan and what it trains with
        ("optimizers.py", "(max_norm / (norm + 1e-6)).clamp(max=1.0)", "(max_norm / (norm + 1e-6))", "tests/dist/test_optimizers.py"),
        ("optimizers.py", "squares = torch.stack(norms).double().square().sum()", "squares = torch.stack(norms).double().sum()", TITAN + "test_optimizer.py tests/dist/test_optimizers.py"),
        ("optimizers.py", "(rows // group.get(\"stacked\", 1), columns)", "(rows, columns)", MUON),
        ("optimizers.py", "gradients = [torch.where(skip, m, g) for", "gradients = [g for", TITAN + "test_optimizer.py"),
        ("optimizers.py", "torch.where(skip, 1.0, 1 - group[\"lr\"] * group[\"weight_decay\"])", "1 - group[\"lr\"] * group[\"weight_decay\"]", TITAN + "test_optimizer.py"),
        ("optimizers.py", "return min(max(rows - rank * each, 0), each)", "return each", MUON),
        ("optimizers.py", "heapq.heappush(loads, (load + costs[task], rank))", "heapq.heappush(loads, (load, rank))", MUON),
        ("optimizers.py", "[[pieces[holder] for pieces in cut] for holder in range(ranks)]", "[[pieces[rank] for pieces in cut] for holder in range(ranks)]", "tests/dist/test_optimizers.py"),
        ("titan/optimizer.py", "return parameter.ndim == 2 and \"tok_embeddings\" not in name", "return parameter.ndim == 2", TITAN + "test_optimizer.py"),
        ("titan/optimizer.py", "group.update(values)", "pass", TITAN + "test_optimizer.py tests/dist/test_optimizers.py"),
        ("titan/samples.py", "ids += [token] * goes_on", "ids += [token]", TITAN + "test_samples.py"),
        ("titan/samples.py", "scores[1::2].softmax(1), 1, generator=generator", "scores[1::2].softmax(1), 1", TITAN + "test_samples.py"),
        ("torch_internals.py", "entry.env_value_force = value", "pass", TITAN + "test_parallelize.py"),
        ("titan/records.py", "set_repeated_aside(path, step - redone)", "set_repeated_aside(path, step)", TITAN + "test_samples.py"),
        ("titan/spikes.py", "spread = max(1.4826 * statistics.median(abs(x - median) for x in self.losses), SMALLEST)", "spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses) or 1.0", TITAN + "test_spikes.py"),
        ("titan/stopping.py", "return time.time() + 2 * step_seconds + 2 * save_seconds + self.margin >= self.deadline", "return time.time() + self.margin >= self.deadline", TITAN + "test_stopping.py"),
        ("titan/validator.py", "\"bits_per_byte\": loss_sum / math.log(2) / n_bytes,", "\"bits_per_byte\": loss_sum / math.log(2) / tokens,", TITAN + "test_validator.py"),
        ("titan/validator.py", "\"perplexity\": math.exp(min(loss_sum / tokens, 700.0)),", "\"perplexity\": math.exp(min(loss_sum / n_bytes, 700.0)),", TITAN + "test_validator.py"),
        ("titan/word_validator.py", "unbroken = scored & (wrong.cumsum(1) == 0)", "unbroken = scored & ~wrong", TITAN + "test_word_validator.py"),
        ("titan/feed.py", "self.taken = copy.copy(self.loader)\n        batches, self.ahead = self.ahead, []", "self.taken = self.loader\n        batches, self.ahead = self.ahead, []", TITAN + "test_feed.py"),
        ("titan/watchdog.py", "if time.monotonic() - self.last > self.limit:", "if time.monotonic() - self.last > 1000 * self.limit:", TITAN + "test_watchdog.py"),
        ("config/compare.py", "reached = before(step - 1)", "reached = before(step)", "tests/unit/config/test_compare.py"),
        ("config/schedule.py", "if last == warmup + 1 < self.total_steps:", "if False:", "tests/unit/config/test_schedule.py"),
        ("scaling.py", "in_a_host = max(1, min(ranks, self.host // stride))", "in_a_host = min(ranks, self.host)", "tests/unit/test_scaling.py"),
        ("scaling.py", "max(backward, again + reduce + across)", "max(backward, again + reduce)", "tests/unit/test_scaling.py"),
        ("memory.py", "if share % b == 0 and fits(b)", "if fits(b)", "tests/unit/test_scaling.py"),
        ("config/schedule.py", "first_decaying = self.total_steps + 1 - decay", "first_decaying = self.total_steps - decay", "tests/unit/config/test_schedule.py"),
        ("compare/groups.py", "for value in values) / (n - 1)", "for value in values) / n", "tests/unit/test_compare_runs.py"),
        ("compare/groups.py", "for key, name in changed.items() if key not in SEEDS", "for key, name in changed.items()", "tests/unit/test_compare_runs.py"),
        ("runs.py", "idle = last is None or time in launches or", "idle = last is None or", "tests/unit/test_compare_runs.py"),
        ("runs.py", "(time in before_a_step and last not in launches)", "False", "tests/unit/test_compare_runs.py"),
        ("report.py", "autoescape=not markdown", "autoescape=False", "tests/unit/test_report.py"),
        ("report.py", "path.is_file() and path.resolve().is_relative_to(home)", "path.is_file()", "tests/unit/test_report.py"),
        ("status.py", "left * typical[\"seconds\"]) if typical and left > 0", "left * typical[\"seconds\"]) if typical", "tests/unit/test_status.py"),
        ("history.py", "if record[\"step\"] not in met", "", "tests/unit/test_history.py"),
        ("jobs.py", "if line.startswith(\"error:\")", "if line", "tests/unit/test_jobs.py"),
        ("devices.py", "min(MOST_THREADS, max(1, cores() // processes))", "max(1, cores() // processes)", "tests/unit/test_jobs.py"),
        ("config/load.py", "whole = schema()[key].record.is_prose and", "whole = False and", "tests/unit/config/test_load.py"),
        ("titan/metrics.py", "self.tensorboard.log_settings(hyperparameters(self.job_config), step)", "pass", TITAN + "test_metrics.py"),
        ("checkpoint/model_card.py", "*([f\"license: {license}\"] if license else []),", "", CHECKPOINT + "test_hf.py"),
        ("evaluation/state_tracking/horizon.py", "fitted = (positions >= reach // 4) & (positions <= reach) & (lost > 0)", "fitted = (positions <= reach) & (lost > 0)", "tests/unit/evaluation/test_horizon.py"),
        ("evaluation/state_tracking/problems.py", "least.append(torch.cat(margins, 1).cummin(1).values.cpu().numpy())", "least.append(torch.cat(margins, 1).cpu().numpy())", "tests/unit/evaluation/test_horizon.py"),
        ("evaluation/lm_harness/__init__.py", "return made_by if len(found) == len(conventions(made_by[\"arguments\"])[0]) else {}", "return made_by", "tests/unit/evaluation/test_lm_harness.py"),
        ("config/stand_ins.py", "del sys.modules[name]", "pass", "tests/unit/test_others.py"),
        ("evaluation/figures.py", "places.append(max(y, places[-1] + gap) if places else y)", "places.append(y)", "tests/unit/evaluation/test_pictures.py"),
        ("__main__.py", "(name == near or name.endswith(f\" {near}\"))", "name == near", "tests/unit/test_command.py"),
    ]
]
# fmt: on


def unfit(mutant: Mutant) -> str:
    """Why a mutant cannot be made, or ""."""
    count = (REPO / PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    return "" if count == 1 else f"{mutant.old!r} stands {count} times in {mutant.file}"


def run(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests fail on the mutant; `copy` is left as it was."""
    path = copy / PACKAGE / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
    try:
        done = subprocess.run(
            command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text, encoding="utf-8")
    # 2 to 5: interrupted, no tests, a wrong command line. A mutant that does not even import is no mutant.
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run on {mutant}:\n{done.stdout.decode()[-2000:]}")
    return done.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose file, line or tests contain one of these")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(word in " ".join(m) for word in options.words)]
    if wrong := [problem for problem in map(unfit, chosen) if problem]:
        raise SystemExit("\n".join(wrong))
    if options.list:
        print(*(f"{m.file}: {m.old.strip()}  ->  {m.new.strip()}" for m in chosen), sep="\n")
        return
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder, "copy")
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True).stdout.decode()
        for name in filter(None, tracked.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, copy / name)
        for number, mutant in enumerate(chosen, start=1):
            start = time.monotonic()
            caught = run(mutant, copy)
            survivors += [] if caught else [mutant]
            verdict = "caught" if caught else "SURVIVED"
            seconds = time.monotonic() - start
            print(
                f"{number:2d}/{len(chosen)} {verdict:8s} {seconds:4.0f} s  {mutant.file}: {mutant.new[:80]!r}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")


if __name__ == "__main__":
    main()
