"""Defects that a contributor could make, each with the test that has to notice it: `make test-mutants`.

A test says little unless it fails when the code is wrong. So for each defect the repository is copied into a temporary
directory, the defect is planted in the copy, and its test runs there; the working tree stays as it is. A defect that is
not caught means that its test no longer guards what it says. To try some: `make test-mutants MUTANTS="padding -j 2"`.

In the list, a line that begins with

    @  names a file of the source and the file of the tests, for the defects that follow,
    #  names the test, and says what is wrong,
    -  is what to replace, part of a line or several lines; it occurs exactly once in the file,
    +  is what takes its place.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.repository import ROOT, repository_files

_LIST = r"""
@ hf_megatron/tensor_parallel/mappings.py -> tests/tensor_parallel/test_mappings.py
# test_regions_sum_cut_and_join: g does not sum
- partial(_all_reduced, group), _same)
+ _same, _same)
# test_regions_sum_cut_and_join: g sums the gradient once more, which is whole already
- partial(_all_reduced, group), _same)
+ partial(_all_reduced, group), partial(_all_reduced, group))
# test_copy_sums_the_gradients: f leaves gradients partial sums
- results[i] = total
+ results[i] = gradients[i]
# test_backward_of_copy_leaves_sibling_gradient_alone: f sums in place, and so changes a gradient that others hold
- total = tensor.clone(memory_format=torch.contiguous_format)
+ total = tensor.contiguous()
# test_regions_sum_cut_and_join: sequence parallelism: a slice of a partial sum for the sum's slice
- partial(_gathered, group, dim, size), partial(_reduce_scattered, group, dim))
+ partial(_gathered, group, dim, size), partial(_sliced, group, dim))
# test_regions_sum_cut_and_join: sequence parallelism: the gradient is not gathered
- gather = partial(_gathered, group, dim, tensor.shape[dim])
+ gather = _same
@ hf_megatron/tensor_parallel/linear.py -> tests/tensor_parallel/test_linear.py
# test_linear_layers_equal_plain_products: each rank adds the bias before the sum
- partial_sum = _product(x, weight, None, self.weight_layout)
+ partial_sum = _product(x, weight, bias, self.weight_layout)
# test_linear_layers_equal_plain_products: queries, keys and values of a bias lie one row after the other
- rows = whole.view(blocks, -1)
+ rows = whole.view(-1, blocks).t()
# test_linear_layers_equal_plain_products: the gradient of a bias that is held whole stays a partial sum
- wait = start_all_reduce(entry.group, buffer)
+ wait = start_all_reduce(entry.group, of_x)
@ hf_megatron/tensor_parallel/shared_heads.py -> tests/models/test_equality.py
# test_any_number_of_heads: what a neighbour computes from a shared head is missing in its gradient
- gradient[..., : from_left.shape[-1]] += from_left
+ pass
# test_any_number_of_heads: columns are put on the wrong side
- zip(left, tensors, right, strict=True)
+ zip(right, tensors, left, strict=True)
@ hf_megatron/models/attention.py -> tests/models/test_equality.py
# test_any_number_of_heads: a rank keeps the context of the columns that its neighbour keeps too
- context[..., cut.columns]
+ context[..., : cut.columns.stop - cut.columns.start]
@ hf_megatron/partition/heads.py -> tests/partition/test_heads.py
# test_every_column_is_there_once: a shared head's probabilities are reported twice
- range(-(-start // self.head_dim), -(-stop // self.head_dim))
+ range(start // self.head_dim, -(-stop // self.head_dim))
@ hf_megatron/tensor_parallel/group.py -> tests/tensor_parallel/test_exit.py
# test_unfinished_collectives_do_not_abort: nothing waits for gloo's threads
- atexit.register(time.sleep, 0.1)
+ pass
@ hf_megatron/tensor_parallel/sequence_parallel.py -> tests/models/test_sequence_parallel.py
# test_micro_batches_add_up: gradients of norms and biases stay those of this rank's positions
- copy_to_tensor_parallel_region(self.group, *(local(parameter) for parameter in parameters))
+ [local(parameter) for parameter in parameters]
@ hf_megatron/tensor_parallel/embedding.py -> tests/tensor_parallel/test_embedding.py
# test_embedding_equals_the_whole_one: the padding index is global, the rows are local
- padding - start if padding is not None
+ padding if padding is not None
# test_embedding_equals_the_whole_one: an uneven vocabulary is cut at multiples of the rounded quotient
- start, stop = chunk_range(self.num_embeddings, group.size, group.rank)
+ start, stop = (self.num_embeddings // group.size * (group.rank + i) for i in range(2))
# test_embedding_equals_the_whole_one: tokens of other ranks get row 0
- embedded.masked_fill(~is_mine[..., None], 0.0)
+ embedded
@ hf_megatron/tensor_parallel/cross_entropy.py -> tests/tensor_parallel/test_cross_entropy.py
# test_loss_and_gradient_equal_torchs: the maximum is this rank's
- maximum = maxima.amax(0)
+ maximum = maxima[group.rank]
# test_extreme_logits: no maximum is taken off
- maxima.append(values.amax(1))
+ maxima.append(torch.zeros_like(values[:, 0]))
# test_loss_and_gradient_equal_torchs: label smoothing over this rank's words
- statistics[:, 3].sum(0) / vocabulary.size
+ statistics[:, 3].sum(0) / logits.shape[1]
# test_loss_and_gradient_equal_torchs: ignored positions count in the mean
- divisor = is_counted.sum() if
+ divisor = is_counted.numel() if
# test_loss_and_gradient_equal_torchs: num_items_in_batch is ignored
- is_counted.sum() if num_items_in_batch is None else num_items_in_batch
+ is_counted.sum()
@ hf_megatron/tensor_parallel/cross_entropy.py -> tests/tensor_parallel/test_linear_cross_entropy.py
# test_gradients_of_a_sure_model_are_as_exact_as_stocks: a probability is rounded before the target is taken off
- .exp_().mul_(factor[rows, None])
+ .exp_().mul_(factor[rows, None]).to(out.dtype).to(share.dtype)
@ hf_megatron/tensor_parallel/linear_cross_entropy.py -> tests/tensor_parallel/test_linear_cross_entropy.py
# test_many_chunks_are_not_added_up_in_bfloat16: chunks are added up in bfloat16
- is_short = not is_one_chunk or head.dtype == torch.float16
+ is_short = head.dtype == torch.float16
# test_loss_and_gradients_equal_torchs: the gradient of hidden states stays a partial sum
- reduce_gradient=reduce_gradient and group.size > 1
+ reduce_gradient=False
@ hf_megatron/tensor_parallel/linear_cross_entropy.py -> tests/tensor_parallel/test_edge_cases.py
# test_ranks_with_uneven_shards_have_the_same_chunks: chunks are as long as a rank's own shard allows
- // largest_shard)
+ // weight.shape[0])
@ hf_megatron/tensor_parallel/cpu.py -> tests/tensor_parallel/test_tied_gradient.py
# test_gradient_is_that_of_two: the gradient of a head is lost where the lookups have none
- of_head if of_lookups is None else of_lookups.to_dense()
+ None if of_lookups is None else of_lookups.to_dense()
@ hf_megatron/tensor_parallel/random.py -> tests/tensor_parallel/test_random.py
# test_masks_do_not_depend_on_the_degree: heads are counted on each rank
- generator.manual_seed(int(seed) + first_head + head)
+ generator.manual_seed(int(seed) + head)
# test_slices_are_dropped_as_the_whole_is: the mask of a slice is drawn for the slice
- F.dropout(x.new_ones(shape), p).narrow(dim, start, stop - start) != 0
+ F.dropout(torch.ones_like(x), p) != 0
@ hf_megatron/tensor_parallel/agreement.py -> tests/training/test_ranks_in_step.py
# test_what_depends_on_the_rank_is_found_from_the_start: the guard compares nothing
- if len(set(digests)) > 1:
+ if not digests:
@ hf_megatron/tensor_parallel/agreement.py -> tests/tensor_parallel/test_collectives.py
# test_every_rank_is_heard: the last rank's wishes alone are heard
- result |= wish
+ result = wish
@ hf_megatron/models/heads.py -> tests/models/test_sequence_parallel.py
# test_micro_batches_add_up: behind a gather the head's gradient is summed twice
- reduce_gradient=region is None
+ reduce_gradient=True
@ hf_megatron/models/bert/modeling_bert.py -> tests/models/test_equality.py
# test_heads_equal_stock: pre: the residual starts behind the norm
- context, _ = self.self(self.ln(hidden_states, region), attention_mask
+ hidden_states = self.ln(hidden_states, region)
+         context, _ = self.self(hidden_states, attention_mask
@ hf_megatron/models/bert/modeling_bert.py -> tests/models/test_communication.py
# test_collectives_of_a_training_step: queries, keys and values each sum the gradient of their input
- if self.tp_group.size > 1 and all(
+ if region is not None and all(
@ hf_megatron/models/bert/modeling_bert_heads.py -> tests/models/bert/test_masked_lm.py
# test_only_labelled_positions_are_computed: the masked-LM head transforms every position
- hidden_states, targets = hidden_states[is_labelled], labels[is_labelled]
+ del is_labelled
@ hf_megatron/models/initialization.py -> tests/models/test_initialization.py
# test_weights_do_not_depend_on_the_layout: each rank draws its part on its own
- target.copy_(DtensorShardOperation(parameter).shard_tensor(drawn, device=target.device, dtype=target.dtype))
+ target.copy_(_DrawnTensor(tuple(target.shape), std, seed, name, zero_row)[...])
@ hf_megatron/partition/tiling.py -> tests/checkpoint/test_sharded.py
# test_a_lost_shard_is_refused: a lost shard is a smaller tensor
- if _cover_once(whole, filled, cut):
+ if _cover_once(whole, filled, cut) or sum(box.numel for box in filled) < whole.numel:
@ hf_megatron/partition/tiling.py -> tests/partition/test_tiling.py
# test_messages_name_the_piece: a stale shard is one more piece, as long as the sizes add up
- if _cover_once(whole, filled, cut):
+ if sum(box.numel for box in filled) == whole.numel:
@ hf_megatron/checkpoint/spelling.py -> tests/checkpoint/test_spelling.py
# test_a_different_tied_head_is_refused: a tied head with values of its own is dropped
- _require_same(copy, found[original])
+ pass
# test_spellings_of_every_class: gamma and beta are not known
- {".gamma": ".weight", ".beta": ".bias"}
+ {}
# test_obsolete_buffers_are_dropped_by_name: obsolete buffers are unknown tensors
- elif table.is_obsolete(stored):
+ elif not stored:
@ hf_megatron/checkpoint/directory.py -> tests/checkpoint/test_directory.py
# test_a_tensor_in_two_files_is_refused: of a name in two files the last one wins
- if name in tensors:
+ if not name:
@ hf_megatron/checkpoint/unpickle.py -> tests/checkpoint/test_torch_file.py
# test_nothing_is_imported_or_made: a module that a pickle names is imported
- result = Global(module, attribute)
+ __import__(module)
+         result = Global(module, attribute)
@ hf_megatron/checkpoint/unpickle.py -> tests/checkpoint/test_hostile_pickles.py
# test_old_names_in_a_new_protocol_are_not_translated: names of Python 2 are translated in every protocol
- if self._protocol < 3:
+ if self._protocol < 6:
@ hf_megatron/checkpoint/torch_file.py -> tests/checkpoint/test_hostile_pickles.py
# test_each_pickle_of_a_legacy_file_is_judged: the pickle with the system's information is not judged
- system = _read_pickle(path, file, ())
+ system = read_pickle(file).value
# test_views_out_of_their_storage: a view may lie beyond its storage
- if numel and offset + _span(shape, strides) > storage.size:
+ if numel and offset + _span(shape, strides) > storage.numel:
@ hf_megatron/checkpoint/zip_directory.py -> tests/checkpoint/test_hostile_archives.py
# test_a_second_pickle: of two entries with one name the last one is read
- if entry.name.lower() in names:
+ if not entry.name:
# test_archives_that_contradict_themselves: the directory is read where its end says, whatever stands before the end
- if disk or first_disk or count != total or start + size != stop:
+ if disk or first_disk or count != total:
@ hf_megatron/checkpoint/safetensors_header.py -> tests/checkpoint/test_safetensors_reference.py
# test_headers: true is a size
- if not is_place or not all(type(number) is int and
+ if not is_place or not all(isinstance(number, int) and
@ hf_megatron/checkpoint/regular_file.py -> tests/conversion/test_limits.py
# test_sources_that_are_refused: a pipe is opened, and waited for
- if not stat.S_ISREG(mode):
+ if stat.S_ISDIR(mode):
@ hf_megatron/training/optimizer_state.py -> tests/training/test_hostile_checkpoints.py
# test_nothing_in_a_checkpoint_runs: whatever .metadata names is unpickled
- if refused := read.refused(METADATA_GLOBALS):
+ if refused := read.refused(read.names):
# test_nothing_in_a_checkpoint_runs: entries that are no tensors are unpickled
- return torch.load(source, map_location="cpu", weights_only=True)
+ return torch.load(source, map_location="cpu", weights_only=False)
@ hf_megatron/checkpoint/atomic_directory.py -> tests/checkpoint/test_atomic_directory.py
# test_everything_is_on_disk_before_it_has_its_name: files are renamed before they are on disk
- sync(*self.path.rglob("*"), self.path, self.container)
+ pass
# test_the_first_rank_waits_for_the_others_before_it_publishes: the first rank publishes before the others have written
- self._settle()  # every rank has written its part
+ pass
# test_what_another_host_has_taken_over_is_not_published: another host's files are published
- if not self._lock.is_held():
+ if False:
@ hf_megatron/checkpoint/write_lock.py -> tests/checkpoint/test_atomic_directory.py
# test_a_directory_of_the_users_is_never_touched: a name is taken for a mark
- if not mark.exists() and any(directory.iterdir()):
+ if False:
@ hf_megatron/checkpoint/renaming.py -> tests/conversion/test_atomic.py
# test_killed_between_the_renames_is_repaired: what was killed between the renames is deleted
- if not old.exists():
+ if False:
@ hf_megatron/checkpoint/file_identity.py -> tests/checkpoint/test_lazy.py
# test_a_file_that_changes_after_opening_is_noticed: offsets of one file are used in another
- if now != before:
+ if now.size != before.size:
@ conversion/hf_megatron_conversion/source_files.py -> tests/conversion/test_nothing_is_lost.py
# test_a_flipped_bit_of_an_archive_is_found: checksums of archives are not compared
- if self._crc != crc:
+ if False:
@ conversion/hf_megatron_conversion/journal.py -> tests/conversion/test_kills.py
# test_resume_keeps_what_is_complete: files of another content are kept
-  and sha256_of(directory / name) == digest:
+ :
@ hf_megatron/checkpoint/checksums.py -> tests/training/test_damage.py
# test_every_damage_to_every_file_is_found_before_the_first_step: sizes are compared, checksums are not
- elif not sizes_only and _of(path)
+ elif sizes_only and _of(path)
@ hf_megatron/training/training_state.py -> tests/training/test_trainer.py
# test_resuming_at_the_same_layout_changes_no_bit: torch's random state is not restored
- torch.random.set_rng_state(state["cpu"])
+ pass
@ hf_megatron/training/optimizer_state.py -> tests/training/test_trainer.py
# test_resuming_at_another_layout: a resumed run has a fresh optimizer
- set_optimizer_state_dict(model, optimizer, state, options=options)
+ optimizer.state.clear()
@ hf_megatron/training/checkpoints.py -> tests/training/test_float16.py
# test_the_loss_scale_is_resumed: the loss scale starts over
- self.accelerator.scaler.load_state_dict(read_state(path))
+ read_state(path)
@ hf_megatron/training/loss_scale.py -> tests/training/test_float16.py
# test_an_overflow_on_one_rank_is_skipped_by_all: an overflow is one rank's own affair
- dist.all_reduce(flag, dist.ReduceOp.MAX)
+ assert dist.is_initialized()
@ hf_megatron/peft/lora_layers.py -> tests/peft/test_equality.py
# test_a_step_is_that_of_stock_peft: a column-parallel layer's B is cut in one block
- ColumnParallelLinear(r, base.out_features, bias=False, specs=specs)
+ ColumnParallelLinear(r, base.out_features, bias=False)
@ hf_megatron/planning/memory.py -> tests/planning/test_planner.py
# test_sharded_data_parallelism_divides_weights_and_state: no gradients are there at the peak
- at_end = gradients + per_layer
+ at_end = per_layer
@ hf_megatron/planning/traffic.py -> tests/planning/test_traffic.py
# test_collectives_of_a_step: the sum behind the embedding is not planned
- yield Collective("embedding, forward", "all-reduce", "tp", 1,
+ yield Collective("embedding, forward", "all-reduce", "tp", 0,
@ hf_megatron/paper/metrics/answer_match.py -> tests/metrics/test_metrics.py
# test_words_and_f1: articles are cut out of words
- r"\b(a|an|the)\b"
+ r"(a|an|the)"
@ conversion/hf_megatron_conversion/converter.py -> tests/conversion/test_atomic.py
# test_overlap_is_refused: a destination inside the source is written
-  or resolved in target.parents:
+ :
@ conversion/hf_megatron_conversion/tensors.py -> tests/conversion/test_command_line.py
# test_overflow_is_refused: weights too large for float16 become infinite
- if overflown.any():
+ if overflown.all():
@ conversion/hf_megatron_conversion/formats/megatron_lm/merge.py -> tests/conversion/megatron_lm/test_read.py
# test_every_version_and_degree: version 0 is read in the order of version 1
- if version < 1.0:
+ if version < 0.0:
@ conversion/hf_megatron_conversion/formats/megatron_lm/reader.py -> tests/conversion/megatron_lm/test_read.py
# test_padding_of_the_vocabulary: the padding of the vocabulary is kept
- limit = self._sizes["vocab_size"] if name in VOCABULARY else None
+ limit = None
"""


@dataclass
class Defect:
    """One defect, and the node id of the test that has to fail with it."""

    title: str
    file: str
    test: str
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def planted(self) -> str:
        """The file's source with the defect in it; ValueError if the text does not occur exactly once."""
        source, text = (ROOT / self.file).read_text(encoding="utf-8"), "\n".join(self.old)
        if (count := source.count(text)) != 1:
            raise ValueError(f"{self.file} has this {count} times, and not once: {text}")
        return source.replace(text, "\n".join(self.new))


def defects() -> list[Defect]:
    """All defects of the list."""
    found: list[Defect] = []
    file = test_file = ""
    for line in _LIST.strip().splitlines():
        kind, text = line[0], line[2:]
        if kind == "@":
            file, _, test_file = text.partition(" -> ")
        elif kind == "#":
            test, _, title = text.partition(": ")
            found.append(Defect(title, file, f"{test_file}::{test}"))
        else:
            (found[-1].old if kind == "-" else found[-1].new).append(text)
    return found


def _run(tests: Sequence[str], defect: Defect | None = None) -> tuple[int, str]:
    """Exit code and output of pytest in a copy of the repository, with a defect if there is one."""
    with tempfile.TemporaryDirectory(prefix="hf-megatron-mutant-") as scratch:
        copy = Path(scratch).resolve()
        for path in repository_files():
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        if defect is not None:
            (copy / defect.file).write_text(defect.planted(), encoding="utf-8")
        # Before the working tree, so that all processes of a test import the copy.
        changes = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'conversion'}"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, *tests], cwd=copy, env=changes, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


def _is_caught(defect: Defect) -> bool:
    """Whether the test fails with the defect; says so."""
    started = time.monotonic()
    code, output = _run([defect.test], defect)
    verdict = {0: "NOT CAUGHT", 1: "caught"}.get(code, f"{output[-3000:]}\nDID NOT RUN (exit code {code} of pytest)")
    print(f"{verdict}: {defect.title} ({defect.file}, {time.monotonic() - started:.0f} s)", flush=True)
    return code == 1


def main() -> int:
    """Try the chosen defects; the exit code is 1 if one is not caught, and 2 if a test fails without any."""
    parser = argparse.ArgumentParser(description="Plant defects, one at a time, and see that the tests catch them.")
    parser.add_argument("select", nargs="?", default="", help="only defects whose title, file or test contains this")
    parser.add_argument("--list", action="store_true", help="list the defects and run nothing")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="try N at a time")
    options = parser.parse_args()
    chosen = [d for d in defects() if any(options.select in text for text in (d.title, d.file, d.test))]
    for defect in chosen:
        try:
            defect.planted()
        except ValueError as error:
            parser.error(str(error))
        if options.list:
            print(f"{defect.title}\n    {defect.file}\n    {defect.test}")
    if options.list:
        return 0
    code, output = _run(sorted({defect.test for defect in chosen})) if chosen else (5, "")
    if code != 0:
        print(f"{output[-3000:]}\nWithout any defect the tests have to pass, and do not; or none was chosen.")
        return 2
    with ThreadPoolExecutor(options.j) as executor:
        caught = list(executor.map(_is_caught, chosen))
    print(f"{sum(caught)} of {len(caught)} defects were caught.")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
