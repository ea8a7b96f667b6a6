"""Train a language model: config -> process group -> Strategy (DDP), Feed, checkpoints -> the loop.

Started once per GPU by torchrun, within job/launch.py. By hand, after ``source env.sh``, it is a
world of one: ``"$TRAINSTACK_PYTHON" train.py --config config.yaml``. Everything durable goes to the
run folder; the same command again continues the run.
"""

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trainstack  # noqa: F401  # isort: skip  # names a wrong Python before torch is missed

gc.disable()  # what is imported stays, and looking at it again and again takes 0.3 s

from trainstack import distributed
from trainstack.adapter.base import base_of
from trainstack.adapter.lora import count_saved
from trainstack.checkpoint.interval import Interval
from trainstack.checkpoint.saver import Saver
from trainstack.checkpoint.snapshot import Saved, SaveError, Snapshot
from trainstack.checkpoint.state import TrainState
from trainstack.config.load import load
from trainstack.config.schema import Config
from trainstack.data.corpus import enough_samples, open_corpus
from trainstack.data.feed import Batch, Feed, StepData
from trainstack.evaluation.held_out import evaluate_all, overall
from trainstack.evaluation.samples import Prompts, files_beside
from trainstack.model.causal_lm import build_model
from trainstack.model.ddp import DataParallel
from trainstack.model.loss import CausalLMLoss
from trainstack.model.strategy import Strategy
from trainstack.optim.schedule import build_schedule
from trainstack.resilience.failure import explain
from trainstack.resilience.faults import Faults
from trainstack.resilience.guard import Diverged, Guard, Policy
from trainstack.resilience.stop import Stop
from trainstack.resilience.watchdog import Watch
from trainstack.run.folder import RunFolder
from trainstack.run.identity import identity
from trainstack.run.states import EXIT_CODES, Phase
from trainstack.storage import layout
from trainstack.train import ending, startup
from trainstack.train.announce import announce, announce_loading
from trainstack.train.attempt import Attempt
from trainstack.train.numbers import Pace, Requested, StepNumbers
from trainstack.train.report import Report
from trainstack.waits import ANSWER_SECONDS, COMPILE_SECONDS, LOAD_SECONDS, SAVE_SECONDS


def main(options: argparse.Namespace, config: Config, run: RunFolder) -> str:
    """Own the run, build everything, train; returns the state in which the run was left."""
    watch = Watch(run, options.job, options.attempt, distributed.rank(), config.guard.hang_seconds)
    world = distributed.start(options.expect_world_size)
    plan = config.batch_plan(world.world_size)
    corpus = open_corpus(options.home, config, run.checkpoints)
    fixed = identity(config, corpus.key, base_of(options.home, config))  # what may not change

    # Owned before anything slow: two jobs must never both train into one folder.
    owner = startup.name_owner(options.job, options.attempt, options.restarts)
    lease = startup.own_run_folder(run, config, fixed, owner, options.gone, world)
    samples = enough_samples(config, corpus)
    attempt = Attempt(config, world, plan, run, lease, owner, config.steps_for(samples), samples)
    stop = Stop(options.stop_file, options.ends_at, world.is_main)
    if distributed.any_rank(stop.is_wanted(0), world):  # loading may take longer than is left
        return ending.pause(attempt, stop.reason)
    faults = Faults(options.fault, world.rank, owner.attempt)

    # The weights: from the newest checkpoint, else as model.init says.
    announce_loading(attempt)
    newest = startup.find_checkpoint(run, fixed, watch, world)
    model_folder = layout.model_folder(options.home, config.model.name)
    strategy = build_strategy(attempt, newest, model_folder, faults)
    guard = Guard(config.guard, world.device, strategy.scaler.is_enabled())

    # Where the run is. Data and learning rate follow from that: they are functions of the step.
    left_out = distributed.main_decides(world, lambda: startup.left_out(run, newest))
    at_start = TrainState.at_start(fixed, config.model_dump(), left_out, len(corpus.stores))
    state = startup.restore(newest, strategy, guard, at_start)
    feed = Feed(config, corpus, plan, world, state.left_out)
    rate_at = build_schedule(config.optim, attempt.max_steps)
    startup.tell_running(attempt, state.step, stop, count_saved(strategy.causal_lm))
    announce(attempt, feed, strategy, newest)
    small_files = files_beside(strategy.causal_lm, newest or model_folder, corpus)
    loop = Loop(
        attempt=attempt, feed=feed, strategy=strategy, guard=guard, state=state, rate_at=rate_at,
        stop=stop, interval=startup.build_interval(attempt, stop.save_seconds),
        saver=Saver(attempt.run.checkpoints, world, config.checkpoint.save_total_limit, attempt.id,
                    lease.check),
        small_files=small_files, prompts=Prompts(config, corpus.is_chat, small_files),
        watch=watch, faults=faults,
        report=Report(attempt, rate_at, state.step,
                      startup.ideal_seconds(attempt, strategy.loss_model)),
    )  # fmt: skip
    return loop.run()


def build_strategy(
    attempt: Attempt, newest: Path | None, model_folder: Path, faults: Faults
) -> Strategy:
    """The model and its loss, spread over the ranks, with its optimizer. Collective."""
    config = attempt.config
    causal_lm = build_model(config, newest, model_folder)
    loss_model = CausalLMLoss(
        causal_lm, config.train, attempt.world.device, config.data.packing, config.data.seq_len
    )
    faults.attach(loss_model)
    return DataParallel(
        loss_model, config.optim, config.train.precision, attempt.plan, attempt.world
    )


@dataclass(kw_only=True)
class Loop:
    """The loop, and what it works with. Every rank calls its methods in the same order."""

    attempt: Attempt  # what this attempt was asked to do, and for which run
    feed: Feed  # what a step consumes
    strategy: Strategy  # the model as it is spread over ranks, and its optimizer
    guard: Guard  # is this update good?
    state: TrainState  # where we are; what a checkpoint remembers
    rate_at: Callable[[int], float]  # the learning rate of a step
    stop: Stop  # does this rank have a reason to stop?
    interval: Interval | None  # on rank 0 if save_steps is auto: when to save
    saver: Saver  # checkpoints, written during training
    small_files: dict[str, bytes]  # of a checkpoint, beside the weights
    prompts: Prompts  # what the model is asked at each evaluation
    watch: Watch  # ends a loop that does not move
    faults: Faults  # breaks on purpose: TRAINSTACK_FAULT
    report: Report  # log lines, files, status; which rank is slow?

    def __post_init__(self):
        attempt = self.attempt
        self.numbers, self.pace = StepNumbers(attempt.world.device), Pace()
        is_scaled = self.strategy.scaler.is_enabled()
        self.policy = Policy(attempt.config.guard, attempt.config.optim.learning_rate, is_scaled)
        self.is_random = True  # whether a step draws something; found out by the warm-up
        self.stall_seconds = 0.0  # for which the loop stood still since the last save ended
        self.started = time.monotonic()

    def run(self) -> str:
        """From the step where the run is to its end, or to a stop; returns DONE or PAUSED."""
        attempt, state = self.attempt, self.state
        try:
            self.train()
            self.finish_save()
            self.report.close()
            if not (ending.is_over(attempt, state) and state.is_evaluated):
                return ending.pause(attempt, self.stop.reason, state.step)
            self.watch.at(state.step, Phase.END, LOAD_SECONDS)
            return ending.complete(attempt, state, time.monotonic() - self.started)
        except Diverged as error:  # the save of good steps that is under way is finished
            self.watch.at(error.step, Phase.SAVE, SAVE_SECONDS)
            self.saver.wait()
            if attempt.world.is_main:
                attempt.lease.check()  # a rollback is about to be recorded
            raise
        finally:
            self.watch.close()

    def train(self) -> None:
        """Step, evaluate, save, until the run is over or a stop comes."""
        attempt, config, state = self.attempt, self.attempt.config, self.state
        # Compiles and allocates on the samples of the first step; nothing of it is learned.
        self.watch.at(state.step, Phase.WARM_UP, COMPILE_SECONDS)
        self.report.warms_up()
        first = self.feed.at(min(state.step + 1, attempt.max_steps))
        self.is_random = startup.warm_up(self.strategy, first.batches, attempt.world)
        self.saver.reserve(self.strategy.share)
        # A stop may have come meanwhile. An evaluation that the last one cut short is due first.
        is_stopping = distributed.any_rank(self.stop.is_wanted(0), attempt.world)
        if not state.is_evaluated and not is_stopping:
            _, is_stopping = self.evaluate()
        self.report.begins(state.step)
        self.pace.restart()
        while not (is_stopping or ending.is_over(attempt, state)):
            state.step += 1
            # What any rank requested while the step before ran: its numbers have arrived now.
            is_stopping, is_saving = self.step(state.step)
            is_saving |= attempt.is_due(state.step, config.checkpoint.save_steps)
            is_evaluating = attempt.is_due(state.step, config.eval.eval_steps)
            if is_evaluating or is_saving or is_stopping:
                # Read this step's numbers at once, so that its log line comes first. A stop in them
                # counts. A save request is dropped: either we save here anyway, or it comes again.
                is_stopping |= self.read_numbers().stop
            if is_evaluating:
                is_best, is_cut = self.evaluate()
                is_saving, is_stopping = is_saving or is_best, is_stopping or is_cut
            if is_saving or is_stopping or ending.is_over(attempt, state):
                self.save()
                self.pace.restart()

    def step(self, step: int) -> Requested:
        """One optimizer update; returns what ranks requested as of the step before.

        Numbers travel one step late, so the host never waits for this step's. Numbered calls: 1 is
        collective; 1 and 2 are before 3 for verdict and copy; 4 comes when the device has its work.
        """
        self.attempt.lease.check_often()  # a node that Slurm lost may still run: it must not write
        self.watch.at(step, Phase.SAMPLES)
        self.faults.before(step)
        if self.is_random:
            distributed.seed_step(self.attempt.config.run.seed, step, self.attempt.world)
        self.strategy.optimizer.set_learning_rate(self.rate_at(step))
        data = self.feed.at(step)
        # Forward and backward. On a GPU this only queues work: the host is far ahead from here on.
        batches, targets = self.watched(data, step), data.target_tokens
        self.strategy.loss_model.count(self.attempt.is_logged(step))
        loss_sum, grad_norm = self.strategy.gradients(batches, targets, self.numbers.before_waiting)
        # The numbers of the step before have arrived meanwhile: log them, or raise Diverged.
        requested_before = self.read_numbers()
        # Only now: the line of the step before, just logged, is about what was drawn until then.
        self.state.drawn = self.feed.drawn_after(step, self.state.drawn)
        # A stop has to leave time for a step, and for the saves that it waits for.
        step_seconds = max(self.pace.step_seconds, self.watch.median_seconds())
        is_stop_due = self.stop.is_wanted(step_seconds, self.saver.saves_until_stop)
        is_save_due = self.interval is not None and self.interval.is_due(time.monotonic())
        requested = Requested(is_stop_due, is_save_due)
        # 1. One all-reduce: loss, norm, requests, hash. The verdict stays on the device.
        is_bad = self.numbers.send(step, data, loss_sum, grad_norm, requested, self.guard.judge,
                                   self.strategy.loss_model.hits)  # fmt: skip
        self.watch.at(step, Phase.UPDATE)
        # 2. A snapshot that is being copied needs the weights as they were before this update.
        self.stall_seconds += self.saver.before_update()
        # 3. Clips and updates; on all ranks alike nothing happens if the verdict is bad.
        self.strategy.update(is_bad, grad_norm, self.attempt.config.optim.max_grad_norm)
        # 4. A save that ended meanwhile is told; its thread is never waited for here.
        self.save_ended(self.saver.poll())
        return requested_before

    def watched(self, data: StepData, step: int) -> Iterator[Batch]:
        """The batches of a step; the watchdog knows whether one is awaited or used."""
        while True:
            self.watch.at(step, Phase.SAMPLES)
            with self.pace.waiting_for_data():
                batch = next(data.batches, None)
            self.watch.at(step, Phase.GRADIENTS)
            if batch is None:
                return
            yield batch

    def read_numbers(self) -> Requested:
        """Read the numbers that were sent last, log them, and judge what follows from them.

        Returns what any rank requested with them. Diverged if the run cannot continue like this.
        """
        if (result := self.numbers.read()) is None:
            return Requested(False, False)
        self.pace.note(result.sent_at)
        self.watch.note_step(self.pace.step_seconds)
        skips = self.policy.skips_after(
            result.step, result.loss, result.grad_norm, result.is_withheld,
            self.state.skips_in_a_row,
        )  # fmt: skip
        self.state.skips_in_a_row = skips
        if skips:
            self.report.skipped(result, skips)
        self.report.consumed(result)
        self.state.add_loss(result.loss)
        if self.attempt.is_logged(result.step):
            by_source = self.feed.by_source(self.state.drawn)
            self.report.step(result, self.state.take_mean_loss(), *self.pace.read(), by_source)
        return result.requested

    def evaluate(self) -> tuple[bool, bool]:
        """The loss over what is held out, then prompts; whether to keep it as the best, or to stop.

        A stop cuts it short (``state.is_evaluated``): then it comes first when the run is resumed.
        """
        step, started = self.state.step, time.monotonic()

        def wants_stop(phase: Phase = Phase.EVALUATION, seconds: float = 0) -> bool:
            self.watch.at(step, phase, seconds)
            return self.stop.is_wanted(0, self.saver.saves_until_stop)

        config, loss_model, world = self.attempt.config, self.strategy.loss_model, self.feed.world
        results = evaluate_all(self.feed.corpus, config, loss_model, world, wants_stop)
        self.state.is_evaluated = results is not None
        is_best = bool(results) and self.state.take_in(overall(results.values()).loss)
        wants_no_more = partial(wants_stop, Phase.PROMPTS, ANSWER_SECONDS)
        said = self.prompts.ask(loss_model, world, wants_no_more)
        self.report.evaluation(step, results, said, time.monotonic() - started)
        if results != {} or said != []:  # else nothing was done
            self.pace.restart()
        return is_best and config.eval.keep_best, results is None or said is None

    def save(self) -> None:
        """Begin to publish checkpoint-<step>; it is written while the next steps run."""
        started, state = time.monotonic(), self.state
        self.watch.at(state.step, Phase.SAVE, SAVE_SECONDS)
        self.finish_save()  # of the checkpoint before: one at a time
        self.report.save_begins()
        if self.interval:
            self.interval.saving(time.monotonic())
        startup.remember(state, self.attempt, self.strategy, self.guard)
        self.saver.start(
            Snapshot(
                state.step,
                self.strategy.share(),
                state.to_json(),
                self.small_files,
                synced_first=[self.attempt.run.path / "samples.jsonl"],  # the ledger's evidence
                best_step=state.best_step if self.attempt.config.eval.keep_best else 0,
            )
        )
        self.stall_seconds += time.monotonic() - started

    def finish_save(self) -> None:
        """Wait for the save under way; SaveError if it is that of this very step and failed.

        An earlier one that failed is only told: this step's own save makes up for it.
        """
        if not self.saver.is_busy:
            return
        self.watch.at(self.state.step, Phase.SAVE, SAVE_SECONDS)
        saved = self.saver.wait()
        if saved.problem is not None and saved.step == self.state.step:
            raise SaveError(f"checkpoint-{saved.step} could not be written: {saved.problem}")
        self.save_ended(saved)

    def save_ended(self, saved: Saved | None) -> None:
        """A save ended, well or not; None: none did."""
        if saved is not None:
            stall, self.stall_seconds = self.stall_seconds + saved.gpu_seconds, 0.0
            if saved.problem is None:  # one that failed says nothing about the next
                self.stop.save_seconds = saved.seconds
                if self.interval:
                    self.interval.saved(stall, saved.seconds)
            self.report.save_ended(saved, stall)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    home = os.environ.get("TRAINSTACK_HOME")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--home", type=Path, default=home, help="the project; env.sh sets it")
    parser.add_argument("--job", help="id of the Slurm job; default: this process")
    parser.add_argument("--attempt", type=int, default=1, help="of the job, from 1")
    parser.add_argument("--restarts", type=int, default=0, help="how often the job was requeued")
    parser.add_argument("--gone", help="a job that Slurm says has ended: its lease is taken over")
    parser.add_argument("--expect-world-size", type=int, metavar="N")
    parser.add_argument("--stop-file", type=Path, help="when it appears: save and stop")
    parser.add_argument("--ends-at", type=float, help="end of the job, seconds since 1970")
    parser.add_argument("--fault", default="", help="break on purpose; see resilience/faults.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.home is None:
        parser.error("the project's folder is not known; run: source env.sh (or pass --home)")
    return options


def run_and_explain() -> None:
    """Run main; what goes wrong becomes a record, a line and an exit code, never a hang."""
    gc.freeze()  # what was imported
    gc.enable()
    options, run = parse_arguments(), None
    distributed.die_with_parent()
    try:
        config = load(options.config, options.overrides)
        distributed.set_numerics(config.train.precision, config.train.deterministic)
        run = RunFolder(layout.run_folder(options.home, config.run.name))
        state = main(options, config, run)
        # All leave together: taking a process group apart without a peer may abort (gloo, 2.13).
        distributed.gather(None)
        # To torchrun any other code is a failure; the job's shell reads status.json.
        code = EXIT_CODES[state] if options.job is None else 0
    except BaseException as error:
        code = explain(error, run, options.job, options.attempt)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # in order it could wait for ever, on a collective that nobody answers


if __name__ == "__main__":
    run_and_explain()
