"""A sentencepiece model as a tokenizer.json with the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taid_megatron.config.errors import UserError

_SPACE = "\u2581"
_CONTROL, _USER_DEFINED = 3, 4
_BPE, _UNIGRAM = 2, 1
# Each is one thing that converted tokenizers get wrong: spaces, line ends, bytes, digits, letters.
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading and  double   spaces and a trailing one ",
    "def f(x):\n    return x ** 2  # a comment\n\n\tTabs\tand\r\nline ends\n",
    "1234567890 3.14159 -42 0xFF",
    "Größe, naïve, café; Ελληνικά, Русский, 日本語, العربية, 한국어",
    "emoji \U0001f600\U0001f3fd and a rare sign \U00012345",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbb ???? ....",
)


def convert(model: Path, out: Path) -> dict[str, Any]:
    """Write tokenizer.json; returns what belongs into tokenizer_config.json.

    BPE and unigram models. Raises UserError for another kind, and where some text of a set of
    probes would get other ids than sentencepiece gives it.
    """
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    except RuntimeError:
        raise UserError(f"{model}: not a sentencepiece model; give another tokenizer") from None
    proto = _proto(model)
    tokenizer = _build(model, proto)
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    for text in (*_PROBES, *(f"before{symbol}after {symbol} end" for symbol in symbols[:16])):
        expected = processor.encode(text)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise UserError(
                f"{model}: has no equal tokenizer.json ({text!r} would become {found}, not "
                f"{expected}); give a folder that has one"
            )
    tokenizer.save(str(out))
    names = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{
            f"{name}_token": processor.id_to_piece(token)
            for name, token in names.items()
            if token >= 0
        },
    }


def _proto(model: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.read_bytes())
    return proto


def _build(model: Path, proto: Any) -> Any:
    import tokenizers
    from tokenizers import decoders, models

    kind, pieces = proto.trainer_spec.model_type, proto.pieces
    unknown = proto.trainer_spec.unk_id
    fallback = proto.trainer_spec.byte_fallback
    if kind == _BPE:
        vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
        inner: Any = models.BPE(
            vocabulary,
            _merges(pieces, vocabulary),
            unk_token=pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=fallback,
        )
    elif kind == _UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in pieces]
        inner = models.Unigram(scored, unknown, fallback)
    else:
        raise UserError(f"{model}: neither a BPE nor a unigram model; give a tokenizer.json")
    tokenizer = tokenizers.Tokenizer(inner)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([_added(p) for p in pieces if p.type == _CONTROL])
    tokenizer.add_tokens([_added(p) for p in pieces if p.type == _USER_DEFINED])
    return tokenizer


def _added(piece: Any) -> Any:
    import tokenizers

    return tokenizers.AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs that make a piece, the best-scored piece first: the order sentencepiece merges in."""
    found = []
    for piece in pieces:
        text = piece.piece
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found += [
            (-piece.score, vocabulary[left], vocabulary[right], left, right)
            for left, right in pairs
            if left in vocabulary and right in vocabulary and piece.type == 1
        ]
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)
