"""open_clip's BPE tokenizer as a ``tokenizers`` object, so that training, export and apps share one."""

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from xadapter_export.errors import MissingExtraError

START_TOKEN, END_TOKEN = "<start_of_text>", "<end_of_text>"
OPEN_CLIP_VOCAB_SIZE = 49408
_NUM_MERGES = OPEN_CLIP_VOCAB_SIZE - 2 * 256 - 2
_CONTROL = r"[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
_SINGLE_QUOTES, _DOUBLE_QUOTES = "[\u02bc\u2018-\u201b]", "[\u201c-\u201f]"
_LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
_SPACE = r"[\s\x85]+"  # what Python's str.split splits at
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def clip_tokenizer() -> Tokenizer:
    """Builds the tokenizer from the merges that open_clip ships.

    Returns:
        Ids with start and end of text added, neither padded nor cut.

    Source:
        ``SimpleTokenizer`` of open_clip 3.3. Ids are equal for text as people type it, curly quotes,
        ligatures and combining accents included. Not done is the rest of what it calls ftfy for: HTML
        entities are not decoded, broken encodings and full-width letters stay, and a Greek final sigma is
        lower-cased letter by letter.
    """
    spec = find_spec("open_clip")  # only its file is read; importing it would take seconds
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "open_clip is not installed", hint='install it with: pip install "xadapter-export[export]"'
        )
    merges_path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(merges_path.read_bytes()).decode("utf-8").split("\n")[1 : _NUM_MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    return build_clip_tokenizer(merges)


def build_clip_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """Builds a byte-level BPE in CLIP's style: 256 byte symbols, the same ending a word, merges, start, end.

    End-of-text has the highest id, which is how open_clip's ``argmax`` pooling finds it.
    """
    alphabet = _byte_symbols()
    symbols = [
        *alphabet,
        *(symbol + "</w>" for symbol in alphabet),
        *(a + b for a, b in merges),
        START_TOKEN,
        END_TOKEN,
    ]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    # What ftfy does to everyday text: phones type curly quotes, and documents hold ligatures.
    replaced = {_CONTROL: "", _SPACE: " ", _SINGLE_QUOTES: "'", _DOUBLE_QUOTES: '"', **_LIGATURES}
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            *(normalizers.Replace(Regex(pattern), to) for pattern, to in replaced.items()),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens([START_TOKEN, END_TOKEN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START_TOKEN} $A {END_TOKEN}",
        special_tokens=[(START_TOKEN, vocab[START_TOKEN]), (END_TOKEN, vocab[END_TOKEN])],
    )
    return tokenizer


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in open_clip's order: printable bytes first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
