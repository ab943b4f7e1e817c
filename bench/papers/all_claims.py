"""
All claims. Those stand first that say most for their time; later ones share their runs.
"""
from bench.papers.bases import (
    FourBitBase,
    GapShrinksWithSize,
    RatioAgainstWidth,
    SixteenBitBase,
)
from bench.papers.forgetting import ForgetsLessAtEqualLearning, LearnsLessForgetsLess
from bench.papers.layers import (
    AttentionAlone,
    AttentionOnTop,
    BMoreThanA,
    BWithTwiceTheRank,
    ManyMatrices,
    RandomA,
)
from bench.papers.ranks import (
    AsMuchAsFull,
    EmbeddingsAreTheGap,
    LowRanksRunOut,
    QueryNeedsMoreRank,
    RankOneSuffices,
)
from bench.papers.rates import (
    LargerInShortRuns,
    RateAgainstRank,
    SameBeginning,
    SameRateForAllRanks,
    TenTimes,
)
from bench.papers.variants import (
    FasterB,
    LargeBatchesHurt,
    LowRateNeedsRoot,
    RandomAIsBetter,
    RateTransfersToFull,
    VariantsAreEqual,
)
from bench.papers.weights import (
    AmplifiesWhatWNeglects,
    ChangeOfHighRank,
    IntruderDimensions,
    LowRankDoesTheWork,
    SharedFirstDirection,
    SmallerIntruders,
)

CLAIMS = [
    TenTimes(), AsMuchAsFull(), RankOneSuffices(), SameRateForAllRanks(),
    LowRanksRunOut(), LearnsLessForgetsLess(), ForgetsLessAtEqualLearning(),
    LowRankDoesTheWork(), ChangeOfHighRank(), AttentionAlone(), AttentionOnTop(),
    EmbeddingsAreTheGap(), GapShrinksWithSize(), LargeBatchesHurt(), SixteenBitBase(),
    FourBitBase(), RandomA(), BMoreThanA(), BWithTwiceTheRank(), LargerInShortRuns(),
    SameBeginning(), ManyMatrices(), QueryNeedsMoreRank(), IntruderDimensions(),
    AmplifiesWhatWNeglects(), SharedFirstDirection(), SmallerIntruders(),
    RatioAgainstWidth(), LowRateNeedsRoot(), VariantsAreEqual(), FasterB(),
    RandomAIsBetter(), RateAgainstRank(), RateTransfersToFull(),
]
