"""English for made questions: a sentence's verb phrase, a few words of the same meaning, what a heading asks.

Small closed lists, no model. A sentence that does not fit gives nothing rather than a crooked question.
"""

import random
import re

# Verbs that reference documentation begins with, in the imperative ("Return the ...").
_VERBS = frozenset(
    """abort accept acquire activate add adjust allocate allow announce append apply arrange assert assign attach bind
    block build calculate call cancel change check choose clean clear close collect combine compare compile compress
    compute concatenate configure connect construct control convert copy count create deactivate decide decode
    decompress decorate decrypt define delegate delete deliver describe deserialize destroy detach detect determine
    disable disassemble discard disconnect dispatch display divide divert download draw dump emit empty enable encode
    encrypt enqueue ensure enter enumerate escape establish evaluate examine execute exit expand export extend extract
    fetch fill filter find finish flatten flush force fork format generate get group guess handle hash hide identify
    ignore implement import include indent inform initialize insert inspect install instantiate interpret interrupt
    invoke iterate join keep kill launch limit link list listen load locate lock log lookup make map mark match measure
    merge modify mount move negate normalize notify obtain open pack pad parse partition pause perform place pop
    prepare print process produce prompt provide publish push put query quote raise randomize read rearrange rebuild
    receive recompile reconfigure record redirect reduce refresh register release reload remove rename render
    reorganize repeat replace report represent request require reset resize resolve restart restore resume retrieve
    return reverse revert rewind rotate round run sample save scan schedule scroll search select send separate
    serialize serve set shift show shuffle shut shutdown simulate skip sort spawn specify split start stop store strip
    submit subtract suppress suspend swap switch synchronize take terminate test tokenize toggle transform translate
    traverse trim truncate turn undo unbind unlink unlock unpack unquote unregister unset unwrap update upgrade upload
    use validate verify visit wait wake walk wrap write yield zip""".split()
)
_STOP = frozenset(
    """a about above after all also an and any are as at be because been before below between both but by can cannot
    could did do does doing done each either else every few first for from further given had has have having he her
    here him his how i if in instead into is it its itself just may me might more most must my name new no nor not now
    of off on once one only or other others otherwise our out over own per same set she should since so some such than
    that the their them then there these they this those through to too true false two under until up upon us use used
    using value values very via was we were what when where whether which while who whose why will with within without
    would yet you your return returns""".split()
)
# Words that may stand for each other in documentation without changing what is asked. One way only, on purpose.
_SAME = {
    "returns": ("gives back", "gives"), "return": ("get",), "removes": ("strips", "takes away"), "remove": ("strip",),
    "creates": ("makes",), "create": ("make",), "converts": ("turns",), "convert": ("turn",),
    "deletes": ("removes",), "delete": ("remove",), "sends": ("transmits",), "reads": ("loads",),
    "determines": ("finds out",), "determine": ("find out",), "retrieves": ("fetches",), "retrieve": ("fetch",),
    "obtains": ("gets",), "obtain": ("get",), "computes": ("calculates",), "compute": ("calculate",),
    "checks": ("tests",), "check": ("test",), "specified": ("given",), "containing": ("holding", "with"),
    "currently": ("at the moment",), "previously": ("earlier",), "entire": ("whole",), "multiple": ("several",),
    "identical": ("equal",), "corresponding": ("matching",), "begins": ("starts",), "sequence": ("series",),
    "occurrences": ("instances",), "terminates": ("ends",), "constructs": ("builds",),
    "construct": ("build",), "generates": ("produces",), "generate": ("produce",), "prints": ("shows",),
}  # fmt: skip
_NOT_AFTER_VERB = frozenset("of is are was were can can't has have object objects class method case that used".split())
_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*[^\W_]|[^\W\d_]{2,}")
_ASIDE = re.compile(
    r"[:;(]| -- | - |\u2014|, (?:which|but|so|or else|i\.e|e\.g|as|if|unless|where|when|and|or|by|with)\b|\.\s"
)
_QUOTES = re.compile(r"``?|[*\u201c\u201d\"]|(?<!\w)'(?=\w)|(?<=\w)'(?![\w])")
_DEFINITION = re.compile(
    r"(?:(?P<article>An?|The) )?(?P<subject>[A-Za-z][\w-]*(?: [\w-]+){0,3}) (?P<verb>is|are) (?:an?|the|any|one) [a-z]"
)
_NO_SUBJECT = frozenset(
    """it this that these those they there he she we you i what which who where when why how if all each every any some
    one here both note default result first second last following above other only most many such as so but and or also
    then since while because although though after before during once until unless for in on at from with to by your
    my our their his her its per given please another no not whether""".split()
)
_ASKING = (
    "how",
    "what",
    "which",
    "who",
    "where",
    "when",
    "why",
    "should",
    "can",
    "do",
    "does",
    "is",
    "are",
    "may",
    "will",
)
_DULL = frozenset(
    """introduction overview contents table summary example examples note notes see also references usage background
    appendix description details general miscellaneous index abstract conclusion parameters section chapter
    part""".split()
)


def content_words(text: str) -> list[str]:
    """Return the words that carry meaning, in lower case and in order.

    >>> content_words("Remove the common whitespace from every line.")
    ['remove', 'common', 'whitespace', 'line']
    """
    return [word for word in map(str.casefold, _WORD.findall(text)) if word not in _STOP]


def verb_phrase(sentence: str, name: str, kind: str = "function") -> str:
    """Return what a thing does, in the third person and without its name; empty if the sentence does not say.

    >>> verb_phrase("Copy and return the mode bits from src to dst (see chmod).", "shutil.copymode")
    'copies and returns the mode bits from src to dst'
    """
    words = _clause(sentence, name, kind)
    if not words:
        return ""
    words[0] = third_person(_base(words[0]))
    if len(words) > 3 and words[1] in ("and", "or") and words[2].lower() in _VERBS:
        words[2] = third_person(words[2].lower())
    return " ".join(words)


def imperative_phrase(sentence: str, name: str, kind: str = "function") -> str:
    """Return what a thing does, as one asks how to do it; empty for what cannot be asked so.

    >>> imperative_phrase("Returns a list of supported formats for unpacking.", "shutil.get_unpack_formats")
    'get a list of supported formats for unpacking'
    """
    words = _clause(sentence, name, kind)
    if not words or _base(words[0]) != words[0].lower() and len(words) > 2 and words[1] in ("and", "or"):
        return ""
    base = _base(words[0])
    words[0] = "get" if base == "return" else base
    if len(words) > 3 and words[1] in ("and", "or") and words[2] == "return":
        words[2] = "get"
    return " ".join(words)


def _clause(sentence: str, name: str, kind: str) -> list[str]:
    """The words of the sentence up to its first aside, when it begins with a known verb and is worth asking."""
    text = " ".join(_QUOTES.sub("", sentence).split()).rstrip(".")
    aside = _ASIDE.search(text, 25)
    words = (text[: aside.start()] if aside else text).split()
    if not 4 <= len(words) <= 24 or not _base(words[0]) or words[-1].lower() in _STOP or text.startswith("Return self"):
        return []
    last = name.rpartition(".")[2].lower()
    is_telling = any(word.strip(",").lower() in (last, name.lower()) for word in words[1:]) or name in text
    # "Set of names", "Import can't find it": the first word is no verb here. Of classes only "Implements ..." is sure.
    is_noun = words[1].lower() in _NOT_AFTER_VERB or (kind == "class" and not words[0].endswith("s"))
    is_odd = is_noun or "self" in re.split(r"\W", text) or any(mark in word for word in words for mark in "=<>{}[]()_")
    return [] if is_telling or is_odd or len(content_words(" ".join(words[1:]))) < 2 else words


def _base(word: str) -> str:
    """The verb in its base form if it is known, else empty.

    >>> _base("Copies"), _base("Return"), _base("Fixes"), _base("Class")
    ('copy', 'return', '', '')
    """
    lower = word.lower()
    forms = [lower, lower.removesuffix("s"), lower.removesuffix("es"), re.sub("ies$", "y", lower)]
    return next((form for form in forms if form in _VERBS), "")


def third_person(verb: str) -> str:
    """Put a verb into the third person.

    >>> [third_person(v) for v in ("copy", "push", "display", "undo", "get")]
    ['copies', 'pushes', 'displays', 'undoes', 'gets']
    """
    if re.search("[^aeiou]y$", verb):
        return f"{verb[:-1]}ies"
    return f"{verb}es" if re.search("(?:s|x|z|ch|sh|o)$", verb) else f"{verb}s"


def paraphrase(phrase: str, rng: random.Random) -> str:
    """Swap up to two words, drawn at random, for others of the same meaning.

    >>> paraphrase("returns the answer", random.Random(1))
    'gives back the answer'
    """
    words, num_swapped = phrase.split(), 0
    for place, word in enumerate(words):
        if word in _SAME and num_swapped < 2 and rng.random() < 0.6:
            words[place] = rng.choice(_SAME[word])
            num_swapped += 1
    return " ".join(words)


def heading_question(heading: str, rng: random.Random) -> str:
    """Return the question that a heading in prose answers; empty for one that says nothing.

    >>> heading_question("How to book a train", random.Random(0))
    'How do I book a train?'
    """
    text = " ".join(_QUOTES.sub("", heading).split()).strip(" .:#")
    text = re.sub(r"^(?:\d+(?:\.\d+)*\.?|[A-Z]\.|\([a-z0-9]\))\s+", "", text)
    words = text.split()
    if not 1 <= len(words) <= 14 or {w.lower() for w in words} <= _DULL | _STOP:
        return ""
    if text.lower().startswith("how to "):
        return f"How do I {text[7:].rstrip('?')}?"
    if heading.rstrip(" *_`").endswith("?") or (words[0].lower() in _ASKING and len(words) > 3):
        return f"{text[0].upper()}{text[1:].rstrip('?')}?"
    if len(words) > 2 and words[0].lower() in _VERBS and words[0][0].isupper() and words[1][0].islower():
        return f"How do I {words[0].lower()} {' '.join(words[1:])}?"
    topic = text[0].lower() + text[1:] if text[1:2].islower() and words[0].lower() in _STOP else text
    return rng.choice(("What do the documents say about {}?", "What should I know about {}?", "Explain: {}.")).format(
        topic
    )


def key_phrase(sentence: str) -> str:
    """Return the longest run of two to four words that carry meaning, or nothing.

    >>> key_phrase("The travel desk books a window seat for each of its guests.")
    'travel desk books'
    """
    best: list[str] = []
    run: list[str] = []
    at = -1
    for found in _WORD.finditer(sentence):
        is_next = sentence[at : found.start()].isspace() if run else True
        run = [*run, found[0]] if is_next else [found[0]]
        if found[0].casefold() in _STOP:
            run = []
        best = run if len(best) < len(run) <= 4 else best
        at = found.end()
    return " ".join(best) if len(best) > 1 else ""


def define_question(sentence: str) -> str:
    """Return the question that a defining sentence answers; empty if it defines nothing.

    >>> define_question("A widget is a small part that can be replaced.")
    'What is a widget?'
    """
    if re.match(r"[^.]{0,60}\n[ \t]{2,}", sentence):
        return ""  # a label with its text indented below it
    found = _DEFINITION.match(" ".join(_QUOTES.sub("", sentence).split()))
    if not found:
        return ""
    subject, article = found["subject"].split(), found["article"]
    is_vague = len(subject) < 2 if article == "The" else len(subject) > 1 and subject[0].endswith("ing")
    is_sentence = not article and (subject[0].lower() in _NO_SUBJECT or found["verb"] == "is" and subject[0].islower())
    if is_vague or is_sentence or subject[-1].lower() in _STOP or subject[-1].isdigit():
        return ""
    article = f"{article.lower()} " if article else ""
    return f"What {found['verb']} {article}{found['subject']}?"
