"""
Byte-level BPE trained from scratch (Sennrich et al. 2016, §3.2; on bytes as in GPT-2,
Radford et al. 2019, §2.2).

Start with the 256 bytes as tokens. Count how often every pair of neighboring tokens
occurs, merge the most frequent pair into a new token, and repeat. "the the then"
first merges h + e (t + h is as frequent, but its bytes are larger numbers), then t +
he, and soon common words are single tokens. The text is split into words first, by
GPT-2's pattern, so no token reaches from one word into the next.

    naive_bpe("the the then", n_merges=2)           -> [b"he", b"the"]      the idea
    encoding = train_bpe(text, vocab_size=2048)                             the same, but fast
    encoding.encode("the cat")                      -> [261, 782]           depends on the text

tiktoken encodes and decodes with the tokens learned here.
"""
import heapq
from collections import Counter, defaultdict

import regex
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"       # separates stories
# GPT-2's pattern: a contraction, a word, a number, punctuation, or white space. A
# word, a number or punctuation may start with one space.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
BYTES = [bytes([b]) for b in range(256)]
LONGEST_WORD = 256          # characters


# ---- the idea ----------------------------------------------------------------------

def naive_bpe(text, n_merges):
    """Learn tokens by counting all pairs again after each merge.

    Returns the learned tokens (bytes), in the order of merging.
    """
    word_counts = Counter(regex.findall(PATTERN, text))
    frequency = list(word_counts.values())
    words = [list(word.encode()) for word in word_counts]       # lists of token numbers
    vocab = list(BYTES)
    for _ in range(n_merges):
        counts = Counter()
        for word, times in zip(words, frequency):
            for pair in zip(word, word[1:]):
                counts[pair] += times
        most = max(counts.values(), default=0)
        if most < 2:
            break                                               # no pair occurs twice
        pair = min(pair for pair, count in counts.items() if count == most)
        words = [merge_pair(word, pair, len(vocab)) for word in words]
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
    return vocab[256:]


def merge_pair(word, pair, new_token):
    """Replace a pair by a new token: merge_pair([1, 2, 1, 2, 3], (1, 2), 9) -> [9, 9, 3]."""
    merged = []
    i = 0
    while i < len(word):
        if word[i:i + 2] == list(pair):
            merged.append(new_token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def naive_encode(text, learned):
    """Encode a text with the tokens that naive_bpe returned. tiktoken does the same, but fast.

    In each word, the pair that was learned first is merged first. Returns token numbers.
    """
    ranks = {token: rank for rank, token in enumerate([*BYTES, *learned])}
    encoded = []
    for word in regex.findall(PATTERN, text):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            joined = [left + right for left, right in zip(parts, parts[1:])]
            best = min(joined, key=lambda token: ranks.get(token, len(ranks)))
            if best not in ranks:
                break
            i = joined.index(best)
            parts[i:i + 2] = [best]
        encoded += [ranks[part] for part in parts]
    return encoded


# ---- the same, fast ------------------------------------------------------------------

def train_bpe(text, vocab_size=2048):
    """Learn vocab_size entries: 256 bytes, the merges in order, and last <|endoftext|>.

    Returns a tiktoken.Encoding. Deterministic: of equally frequent pairs, the one
    with the smaller token numbers is merged. If no pair occurs twice any more,
    training stops early with a smaller vocabulary. Shows progress. Raises ValueError
    if vocab_size is below 257, or the text contains <|endoftext|>.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least 257: bytes and {EOT}")
    if EOT in text:
        raise ValueError(f"the text contains {EOT}; split it there, and pass the stories")
    pairs = PairCounts(count_words(text))
    vocab = list(BYTES)
    options = dict(desc="learning tokens", delay=1, disable=None, leave=False)
    for _ in tqdm(range(vocab_size - 1 - len(vocab)), **options):
        pair = pairs.pop_most_frequent()
        if pair is None:
            break
        pairs.merge(pair, len(vocab))
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
    return encoding_from_ranks({token: rank for rank, token in enumerate(vocab)})


def count_words(text):
    """How often each word occurs: {word: times}.

    Words longer than LONGEST_WORD, a million spaces for example, are cut, or they would
    become tokens of a megabyte.
    """
    counts = Counter()
    for word in regex.findall(PATTERN, text):
        for start in range(0, len(word), LONGEST_WORD):
            counts[word[start:start + LONGEST_WORD]] += 1
    return counts


END = -1        # marks the ends of words, and places whose token was merged away


class PairCounts:
    """How often each pair occurs, kept up to date while pairs are merged.

    All words lie in one list of tokens, each token linked to the next one and the one
    before. After the words "the" and "he", and the merge of h + e into token 256:

        i         0    1    2    3    4    5    6    7
        tokens  END    t  256  END  END  256  END  END
        after              1 -> 2 -> 4         5 -> 7       the merged places 3 and 6
        before             1 <- 2 <- 4         5 <- 7       are skipped

    A merge affects only the pairs that overlap its occurrences, so all merges together
    take time in proportion to the occurrences: 1 s for 2.4 MB of English, where
    counting everything after each of 1,791 merges takes minutes.
    """

    def __init__(self, words):
        """words {word: how often it occurs}."""
        self.tokens = [END]
        self.times = [0]                        # how often the word of each token occurs
        self.counts = Counter()                 # {pair: how often it occurs}
        self.places = defaultdict(list)         # {pair: where it starts; may be outdated}
        for word, times in words.items():
            encoded = word.encode()
            first = len(self.tokens)
            for i, pair in enumerate(zip(encoded, encoded[1:]), start=first):
                self.counts[pair] += times
                self.places[pair].append(i)
            self.tokens += [*encoded, END]
            self.times += [times] * (len(encoded) + 1)
        n = len(self.tokens)
        self.after = list(range(1, n + 1))      # the index of the next token
        self.before = list(range(-1, n - 1))    # the index of the previous token
        # A heap yields the most frequent pair. It may contain outdated counts; they are
        # recognized when they come up, and dropped.
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def pop_most_frequent(self):
        """The most frequent pair, to be merged now, or None if no pair occurs twice."""
        while self.heap:
            minus_count, pair = heapq.heappop(self.heap)
            count = -minus_count
            if count != self.counts[pair]:
                continue                        # an outdated entry
            return pair if count >= 2 else None
        return None

    def merge(self, pair, new_token):
        """Merge a pair (a, b) into a new token wherever it occurs, from left to right.

            left  a  b  right     becomes     left  new  right

        So (left, a) and (b, right) occur less often; (left, new), (new, right) more often.
        """
        tokens, after, before = self.tokens, self.after, self.before
        counts, places = self.counts, self.places
        a, b = pair
        changed = set()
        for i in sorted(places.pop(pair)):
            second = after[i]
            if tokens[i] != a or tokens[second] != b:
                continue                        # a merge before this one has taken a token
            times, left, right = self.times[i], before[i], after[second]
            tokens[i], tokens[second] = new_token, END
            after[i], before[right] = right, i
            if tokens[left] != END:
                counts[tokens[left], a] -= times
                counts[tokens[left], new_token] += times
                places[tokens[left], new_token].append(left)
                changed |= {(tokens[left], a), (tokens[left], new_token)}
            if tokens[right] != END:
                counts[b, tokens[right]] -= times
                counts[new_token, tokens[right]] += times
                places[new_token, tokens[right]].append(i)
                changed |= {(b, tokens[right]), (new_token, tokens[right])}
        counts[pair] = 0
        # Their entries in the heap are outdated now.
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(self.heap, (-counts[other], other))


def encoding_from_ranks(ranks):
    """Make a tiktoken.Encoding from {token: rank}; <|endoftext|> gets the next rank."""
    return tiktoken.Encoding(
        "bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )
