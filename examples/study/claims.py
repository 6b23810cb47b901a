"""
What is asked, with which arms, and what the paper leads one to expect. Written before the first run.

An arm is a [`~recipe.Recipe`]; arms with equal recipes are trained once, whichever claims ask for them.
"""

from dataclasses import dataclass, replace

from recipe import KINDS, SINGLE, Recipe


REFERENCE = Recipe()
STEPS = REFERENCE.steps
# The paper's "pure" mixture: identical experts, from the plain LLM, after the same connectors and steps of stage 3.
IDENTICAL = Recipe(stage2=0)
# One expert, active for every token, with as many trainable parameters as the four of the mixture.
DENSE = Recipe(stage2=0, experts=1, top_k=1, rank=4 * REFERENCE.rank)


@dataclass(frozen=True)
class Comparison:
    """
    A difference that a claim stands or falls with: the first arm's share of right answers minus the second's.

    Args:
        better, worse (`str`): Arms of the claim; the paper leads one to expect the first to be the better one.
        kinds (`tuple[str]`): Of the rows that count, each kind alike.
        what (`str`): How the kinds are called in a sentence.
        expected (`bool`): Whether the paper says so; else the difference is only asked for.
    """

    better: str
    worse: str
    kinds: tuple[str, ...] = KINDS
    what: str = "all rows"
    expected: bool = True


@dataclass(frozen=True)
class Claim:
    """
    Args:
        letter (`str`): Its short name.
        question (`str`): In one sentence.
        expected (`str`): What the paper leads one to expect, with its figures.
        arms (`dict[str, Recipe]`): Name -> recipe.
        comparisons (`tuple[Comparison, ...]`): The first two make the two sentences of the answer.
        note (`str`): What is equal in all arms, and what is not.
    """

    letter: str
    question: str
    expected: str
    arms: dict[str, Recipe]
    comparisons: tuple[Comparison, ...]
    note: str = ""


def sweep(name: str, recipe: Recipe) -> dict[str, Recipe]:
    """Coefficients of the balancing loss."""
    return {f"{name}, {value:g}": replace(recipe, balancing=value) for value in (0.0, 0.001, 0.01, 0.1)}


def unbalanced(name: str, recipe: Recipe) -> dict[str, Recipe]:
    """Shares of speech among the rows of stage 3."""
    return {f"{name}, {share:.0%}": replace(recipe, rare="speech", rare_share=share) for share in (0.05, 0.2, 0.5)}


OTHERS = tuple(kind for kind in KINDS if "speech" not in kind)

CLAIMS = (
    Claim(
        "a",
        "What does each stage contribute?",
        "Stage 2 helps: 49.2 against 47.5 to 48.2 on average (table 8, one seed; the 49.2 mixes two runs, with the "
        "right figures the gain is 0.3 points). That stage 1 is needed is taken for granted.",
        {
            "three stages": REFERENCE,
            "no stage 2": Recipe(stage2=0, stage3=STEPS - REFERENCE.stage1),
            "no stage 1": Recipe(stage1=0, stage3=REFERENCE.stage1 + REFERENCE.stage3),
            "all at once": Recipe(stage1=0, stage2=0, stage3=STEPS),
            "no stage 2, fewer steps": IDENTICAL,
        },
        (
            Comparison("three stages", "no stage 2"),
            Comparison("three stages", "all at once"),
            Comparison("three stages", "no stage 1"),
            Comparison("three stages", "no stage 2", SINGLE, "rows with one medium"),
            Comparison("three stages", "no stage 2, fewer steps"),
        ),
        f"All arms but the last take {STEPS} optimiser steps of 16 rows; those of a stage that is left out go to "
        "stage 3, which trains connectors whole where there was no stage 1. The last one leaves stage 2 out and has "
        f"the {REFERENCE.stage3} steps of stage 3 that the three stages have, as the paper compares. Half of "
        "the kinds of held-out rows hold two media, and stage 3 alone sees such rows.",
    ),
    Claim(
        "b",
        "How does it scale with the number of experts, and with how many are active?",
        "Four stored experts beat two and one, two active ones beat one, each by 0.3 to 7 points (table 7, a and b).",
        {
            "1 expert": replace(IDENTICAL, experts=1, top_k=1),
            "dense, equal parameters": DENSE,
            **{f"{n}, top-1": replace(IDENTICAL, experts=n, top_k=1) for n in (2, 4, 8, 16)},
            **{f"{n}, top-2": replace(IDENTICAL, experts=n) for n in (4, 8, 16)},
            "4 specialised, top-1": replace(REFERENCE, top_k=1),
            "4 specialised, top-2": REFERENCE,
            "8 specialised, top-2": replace(REFERENCE, experts=8),
        },
        (
            Comparison("4, top-2", "dense, equal parameters"),
            Comparison("4 specialised, top-2", "4 specialised, top-1"),
            Comparison("4, top-2", "4, top-1"),
            Comparison("4, top-1", "1 expert"),
            Comparison("16, top-1", "1 expert"),
            Comparison("8 specialised, top-2", "4 specialised, top-2"),
        ),
        "Compute per token is equal among arms of the same top-k, rank 16 for each active expert; `dense` is one "
        "expert of rank 64, as many trainable parameters as four. Experts are identical ones unless said otherwise, "
        "all after the same stage 1 and with the same steps of stage 3. Two of two experts would route nothing, so "
        "that is left out.",
    ),
    Claim(
        "c",
        "When does the balancing loss help?",
        "It helps identical experts (47.5 to 48.4), hurts four specialised ones (49.2 to 48.5) and helps eight "
        "(tables 8 and 9, one seed).",
        {
            **sweep("4 specialised", REFERENCE),
            **sweep("4 identical", IDENTICAL),
            **sweep("8 specialised", replace(REFERENCE, experts=8)),
            **sweep("8 identical", replace(IDENTICAL, experts=8)),
        },
        (
            Comparison("4 specialised, 0", "4 specialised, 0.01"),
            Comparison("4 identical, 0.01", "4 identical, 0"),
            Comparison("8 specialised, 0.01", "8 specialised, 0"),
            Comparison("8 identical, 0.01", "8 identical, 0"),
            Comparison("4 specialised, 0", "4 specialised, 0.1"),
        ),
        "The coefficient acts in stage 3 alone, beside routers that start with even loads.",
    ),
    Claim(
        "d",
        "Does it matter where the sparse layers lie?",
        "All layers are best on pictures, the second half wins long speech by 5 and 9 points, every second layer is "
        "best on average (table 7, d).",
        {
            "first half": replace(REFERENCE, layers=(0, 1)),
            "second half": replace(REFERENCE, layers=(2, 3)),
            "every second": REFERENCE,
            "all": replace(REFERENCE, layers="all"),
        },
        (
            Comparison("every second", "first half"),
            Comparison("second half", "first half", ("speech", "image+speech", "video+speech"), "rows with speech"),
            Comparison("all", "every second", expected=False),
        ),
        "The decoder has four layers; `all` has twice the experts of the others.",
    ),
    Claim(
        "e",
        "Do mixtures lose less on unbalanced data?",
        "Adding speech costs the dense model 19 points on pictures (POPE 84.7 to 65.8) and the mixture none (85.4).",
        {**unbalanced("mixture", REFERENCE), **unbalanced("identical", IDENTICAL), **unbalanced("dense", DENSE)},
        (
            Comparison("mixture, 50%", "dense, 50%", OTHERS, "rows without speech"),
            Comparison("mixture, 5%", "dense, 5%", ("speech",), "rows of speech, the rare medium"),
            Comparison("identical, 50%", "dense, 50%", OTHERS, "rows without speech"),
            Comparison("identical, 5%", "dense, 5%", ("speech",), "rows of speech"),
            Comparison("mixture, 5%", "mixture, 50%", OTHERS, "rows without speech", expected=False),
            Comparison("dense, 5%", "dense, 50%", OTHERS, "rows without speech"),
        ),
        "Rows of stage 3 are as many in all arms; speech is 5, 20 or 50 % of them, other media share the rest. The "
        "dense model has as many trainable parameters; it had stage 1 alone before, as did the mixture of identical "
        "experts, and `mixture` had stage 2 as well.",
    ),
    Claim(
        "f",
        "Does it hold for new combinations of media?",
        "Experts collaborate on combinations that were never trained together (introduction; no figure).",
        {
            "with them": REFERENCE,
            "no picture and sound": replace(REFERENCE, without=("image+audio",)),
            "no video and speech": replace(REFERENCE, without=("video+speech",)),
            "dense, with them": DENSE,
            "dense, no picture and sound": replace(DENSE, without=("image+audio",)),
            "dense, no video and speech": replace(DENSE, without=("video+speech",)),
        },
        (
            Comparison("with them", "no picture and sound", ("image+audio",), "rows of picture and sound"),
            Comparison("with them", "no video and speech", ("video+speech",), "rows of video and speech"),
            Comparison("no picture and sound", "dense, no picture and sound", ("image+audio",), "such rows"),
            Comparison("no video and speech", "dense, no video and speech", ("video+speech",), "such rows"),
        ),
        "Video and sound, and picture and speech, stay among the rows: what is new is the combination, not its kind.",
    ),
    Claim(
        "h",
        "Own bases or a shared one, and which rank?",
        "The original gives every expert its own base; rank 8 is used throughout, nothing is compared.",
        {
            **{f"shared base, rank {rank}": replace(REFERENCE, rank=rank) for rank in (4, 16, 64)},
            **{f"own bases, rank {rank}": replace(REFERENCE, rank=rank, shared_base=False) for rank in (4, 16, 64)},
        },
        (
            Comparison("own bases, rank 16", "shared base, rank 16", expected=False),
            Comparison("shared base, rank 64", "shared base, rank 4", expected=False),
            Comparison("own bases, rank 64", "own bases, rank 4", expected=False),
        ),
        "With a shared base an expert's LoRA is that of stage 2, trained on; with own bases stage 2's, of rank 16, is "
        "merged and a fresh one added.",
    ),
    Claim(
        "start",
        "Should routers know their experts when stage 3 begins?",
        "The paper starts them at random and does not ask.",
        {
            "informed": REFERENCE,
            "balanced": replace(REFERENCE, router_start="balanced"),
            "random": replace(REFERENCE, router_start="random"),
        },
        (
            Comparison("informed", "balanced", expected=False),
            Comparison("informed", "random", expected=False),
            Comparison("informed", "balanced", SINGLE, "rows with one medium", expected=False),
        ),
        "Steps of stage 3 are equal; the informed start takes 32 steps of its own before, on routers alone.",
    ),
    Claim(
        "control",
        "Does the instrument find something where there is nothing?",
        "With shuffled answers in every stage, nothing may differ and nothing may be learned.",
        {
            "shuffled, specialised": replace(REFERENCE, shuffled=True),
            "shuffled, identical": replace(IDENTICAL, shuffled=True),
        },
        (Comparison("shuffled, specialised", "shuffled, identical", expected=False),),
        "Where mutual information is as high here as in other arms, it tells that the hidden states of media differ, "
        "not that experts are specialised; what is lost without an expert tells that.",
    ),
)

# Measured before stage 3, after a quarter of it, and without each expert.
IN_DEPTH = {*CLAIMS[0].arms.values(), *next(claim for claim in CLAIMS if claim.letter == "start").arms.values()}


__all__ = ["CLAIMS", "IN_DEPTH", "Claim", "Comparison"]
