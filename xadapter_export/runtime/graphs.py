"""The graphs of one session: which answers for each expert set, opened once and checked on this processor."""

import os
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from xadapter_export.bundle.folder import Bundle
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import Deployment, ExpertSet
from xadapter_export.errors import ConfigError, ParityError, XAdapterError
from xadapter_export.parity.recorded import Check, files_of_record, opened_record
from xadapter_export.runtime.choose import Choice, choose, rank
from xadapter_export.runtime.fastest import BUDGET_S, OPENING_S, key_of, recall, remember, time_in_turn
from xadapter_export.runtime.how_to_open import HowToOpen
from xadapter_export.runtime.load_check import check_graph
from xadapter_export.runtime.split import SplitPairs
from xadapter_export.sessions.open import open_variant
from xadapter_export.sessions.session import Array, OnnxSession, Opening
from xadapter_export.sessions.shared import open_shared, open_shared_engine
from xadapter_export.sessions.split_session import SplitSession
from xadapter_export.targets import CPU_PROVIDER, PRECISIONS

FASTEST: Final = "fastest"


class Graphs:
    """The graphs of one session, for several threads.

    Args:
        bundle: The bundle.
        first: The expert set that is opened at once; the others get the same variant, where they have it.
        how: How graphs are opened, and which variant answers.
        pairs: Opens those that are split.

    Raises:
        As ``XAdapterSession.load``.
    """

    def __init__(self, bundle: Bundle, first: ExpertSet, how: HowToOpen, pairs: SplitPairs) -> None:
        self._bundle, self._asked, self._how, self._pairs = bundle, how.variant, how, pairs
        self._providers = [p if isinstance(p, str) else p[0] for p in how.providers or [CPU_PROVIDER]]
        self._refused: dict[ExpertSet, set[str]] = {}
        self._choices: dict[ExpertSet, Choice] = {}
        self._sessions: dict[ExpertSet, OnnxSession] = {}
        self._checks: list[Check] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        if how.variant == FASTEST:
            self._choose_fastest(first)
        else:
            self._choices[first] = self._choose(first, how.variant)
        self.session(first)  # what can go wrong goes wrong now, not at the first question
        self._preferred = self._choices[first].name

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was found when graphs were opened, in that order."""
        return tuple(self._checks)

    def choice(self, experts: ExpertSet) -> Choice:
        """Return what answers for an expert set: the variant that the first set has, or the next best.

        Raises:
            BundleError: If the bundle does not hold the set, or not in a variant that suits.
        """
        if experts not in self._choices:
            names = [variant.name for variant in self._bundle.manifest.variants_of(experts)]
            names += [made.name for made in self._engines_of(experts)]
            has_it = self._preferred in names
            self._choices[experts] = self._choose(experts, self._preferred if has_it else "auto")
        return self._choices[experts]

    def session(self, experts: ExpertSet) -> OnnxSession:
        """Return the graph of an expert set, opened and checked.

        Raises:
            ParityError: If the variant that was named, or every one that suits, gives wrong answers here.
            ConfigError: If the process was forked from the one that opened it, which has its threads.
            As ``XAdapterSession.load``.
        """
        if os.getpid() != self._process:
            raise ConfigError(
                "the session was loaded before this process was forked, and its threads stayed behind",
                hint="load the bundle in each process",
            )
        with self._lock:
            while experts not in self._sessions:
                choice = self.choice(experts)
                session = self._open(choice)
                if (error := self._find_fault(choice, session)) is None:
                    self._sessions[experts] = session
                else:
                    self._choose_another(choice, error)
            return self._sessions[experts]

    def _choose(self, experts: ExpertSet, name: str) -> Choice:
        return choose(
            self._bundle.manifest.variants_of(experts),
            name,
            providers=self._providers,
            machine=read_machine(),
            engines=self._engines_of(experts),
            refused=self._refused.get(experts, ()),
        )

    def _engines_of(self, experts: ExpertSet) -> tuple[Deployment, ...]:
        """Return the deployments of a set that are engines, made from graphs that are in the bundle."""
        manifest = self._bundle.manifest
        sources = {variant.name for variant in manifest.variants_of(experts)}
        return tuple(
            made
            for made in manifest.deployments
            if made.expert_set == experts and made.source in sources and made.engines
        )

    def _open(self, choice: Choice) -> OnnxSession:
        how, variant = self._how, choice.variant
        if choice.engine is not None:
            return open_shared_engine(self._bundle, choice.engine, verify=how.verify)
        opening = Opening(how.providers, how.num_threads, cache_dir=how.cache_folder)
        open_it = open_shared if how.share_weights else open_variant
        open_graph = partial(open_it, self._bundle, how=opening)
        with how.verifying(self._bundle, variant.all_files):
            is_split = variant.query_file is not None
            return self._pairs.open(variant, open_graph) if is_split else open_graph(variant)

    def _find_fault(self, choice: Choice, session: OnnxSession) -> ParityError | None:
        """Check a graph, and return what is wrong with it, or None; an engine is not checked."""
        how, variant = self._how, choice.variant
        if how.check == "never" or choice.engine is not None:
            return None
        computed_by = (repr(list(how.providers or [])), how.num_threads)
        with how.verifying(self._bundle, files_of_record(self._bundle)):
            check = check_graph(self._bundle, variant, session, how.check, computed_by)
        self._checks.append(check)
        if check.passed:
            return None
        hint = 'choose another variant, or skip this check with check="never" (--check never)'
        return ParityError(
            "a variant computes wrong outputs on this processor",
            where=f"{variant.name}, experts {variant.expert_set}, {read_machine()}",
            expected=check.expected,
            got=check.got,
            hint=hint if self._asked == variant.name else None,
        )

    def _choose_another(self, choice: Choice, error: ParityError) -> None:
        """Choose what answers in the place of a variant that is wrong here, and warn.

        Raises:
            ParityError: If it was named, or nothing else will do.
        """
        experts, name = choice.variant.expert_set, choice.name
        if self._asked == name:
            raise error
        self._refused.setdefault(experts, set()).add(name)
        try:
            asked = self._asked if self._asked in PRECISIONS else "auto"
            self._choices[experts] = self._choose(experts, asked)
        except XAdapterError as none_left:
            raise ParityError(str(error), hint=str(none_left)) from none_left
        answers = self._choices[experts].name
        warnings.warn(f"{error}; using {answers} instead", UserWarning, stacklevel=2)

    def _choose_fastest(self, experts: ExpertSet) -> None:
        """Choose the variant that is the fastest here: measured, unless that was done before.

        Raises:
            BundleError: As ``choose`` for ``auto``.
            ParityError: If every variant gives wrong answers.
            ConfigError: If ``cache_dir`` cannot be written.
        """
        how, variants = self._how, self._bundle.manifest.variants_of(experts)
        cache = how.cache_folder
        ranked = rank(variants, providers=self._providers, machine=read_machine())
        by_name = {choice.name: choice for choice in ranked or [self._choose(experts, "auto")]}
        key = key_of(self._bundle, experts, how.providers, how.num_threads)
        timings = None if cache is None else recall(cache, key, by_name)
        if timings is not None:
            self._choices[experts] = replace(by_name[timings.fastest], reason=f"measured before: {timings}")
            return
        start = time.perf_counter()
        opened = self._open_all(by_name, start + OPENING_S)
        if not opened:
            self._choose(experts, "auto")  # says that none is left
        with opened_record(self._bundle) as record:
            feed = record.feed(self._bundle.manifest.expert_sets[experts], record.typical_case)
        runs = {name: partial(_run_alone, session, feed) for name, session in opened.items()}
        timings = time_in_turn(runs, start + BUDGET_S)
        if cache is not None:
            remember(cache, key, timings)
        unopened = set(by_name) - set(opened) - self._refused.get(experts, set())
        left = f"; not timed: {', '.join(sorted(unopened))}" if unopened else ""
        self._choices[experts] = replace(by_name[timings.fastest], reason=f"measured: {timings}{left}")
        self._sessions[experts] = opened[timings.fastest]

    def _open_all(self, choices: Mapping[str, Choice], deadline: float) -> dict[str, OnnxSession]:
        """Open what is right here, in the order given, until time is up; each has then run once."""
        opened: dict[str, OnnxSession] = {}
        for name, choice in choices.items():
            if opened and time.perf_counter() > deadline:
                break
            session = self._open(choice)
            if (error := self._find_fault(choice, session)) is None:
                opened[name] = session
            else:
                self._refused.setdefault(choice.variant.expert_set, set()).add(name)
                warnings.warn(f"{error}; skipping it", UserWarning, stacklevel=2)
        return opened


def _run_alone(session: OnnxSession, feed: Mapping[str, Array]) -> None:
    """Run a graph, or both of one that is split, whatever was kept of the text."""
    session = session.without_memory(None) if isinstance(session, SplitSession) else session
    session.run(None, feed)
