"""
Training captions: names, and sentences with names and keywords that people might type. None of them is a benchmark sentence.
"""

import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from .data import STYLES, Icons, npm_file

BENCHMARK = Path(__file__).parent / "sentences.json"  # each with the names of the objects that count as right
MAX_BYTES = {1: 64, 2: 92, 3: 92}  # of a caption of so many objects; the text encoders read 96
MAX_NAME = 20  # letters of a name that may be one of several in a caption

# what asks for a style; without any of these, pictures are flat
STYLE_PHRASES = {
    "flat": ["flat style", "in flat style", "in a flat style", "as a flat icon", "flat design", "plain style"],
    "3d": ["3d style", "in 3d style", "in 3d", "as a 3d icon", "3d", "rendered in 3d", "as a shaded 3d picture"],
    "high contrast": [
        "high contrast style", "in high contrast style", "in high contrast", "as a high contrast icon", "high contrast",
        "as a high contrast drawing",
    ],
}  # fmt: skip

PALETTE = {
    "red": (215, 50, 60), "orange": (255, 135, 40), "yellow": (255, 210, 70), "green": (60, 150, 60), "blue": (40, 130, 230),
    "purple": (135, 80, 190), "pink": (245, 145, 190), "brown": (125, 85, 60), "grey": (150, 150, 155),
    "black": (45, 45, 50), "white": (255, 255, 255),
}  # fmt: skip

# {x} is the name or a keyword with its article, {n} without; {k} a keyword, {c} a keyword shared by many, {j} an adjective
ABOUT_A_THING = """{x}|{x}|{x}|the {n}|my {n}|one {n}|{x} icon|{x} emoji|a picture of {x}|an emoji of {x}|an icon of {x}
a drawing of {x}|a photo of {x}|a symbol of {x}|draw {x}|draw me {x}|please draw {x}|show me {x}|i want {x}|i need {x}
here is {x}|this is {x}|that looks like {x}|it is {x}|there is {x}|give me {x}|can you draw {x}|{x} on a white background
{j}|{j}|{j}|{j} icon|a picture of {j}|draw {j}|the {a} {n}|my {a} {n}|what {j}|so {a}, {x}|{x}, very {a}
{x} and {k}|{x} with {k}|{x} for {k}|{n}, {k}|{n}: {k}|{k}, {n}|{k}, {x}|{x} that means {k}|{x}, like in {k}|{k} and {n}
{x}, a kind of {c}|{c}: {n}|{n}, {c}|the {c} called {n}|{x} {s}|{j} {s}|the {n} {s}|{x} {s}|someone with {x}"""
ABOUT_A_WORD = """{k}|{k}|{k}|{k}|{k} icon|{k} emoji|a symbol of {k}|a picture of {k}|something about {k}|it is about {k}
{k}, {l}|{k} and {l}|{l} and {k}|{k} or {l}|a symbol for {k} and {l}|{k}, {l} and {m}|about {k}, {l} and {m}
{k} {s}|the {k}|what stands for {k}|think of {k}|when i say {k}|this means {k}|{c}, {k}|{k}: {c}|all about {k}|{a} {k}"""
SEVERAL = {
    2: "{x} and {y}|{x} and {y}|{x}, {y}|{x} next to {y}|{x} beside {y}|{x} on the left and {y} on the right|{x} with {y}",
    3: "{x}, {y} and {z}|{x} and {y} and {z}|{x}, {y}, {z}|{x} next to {y} next to {z}|from left to right {x}, {y} and {z}",
}
ADJECTIVES = """
    nice little big small old young new pretty happy lovely shiny bright sweet fresh funny simple cool real tall
    round soft hot cold tiny modern good great fine large huge long short wide narrow thick thin heavy light strong
    weak quick slow fast busy quiet loud calm clean dirty dry wet warm sharp smooth rough flat open empty full rich
    poor cheap plain fancy wild tame brave shy proud gentle kind angry sad tired sleepy hungry lucky clever silly
    strange odd famous common rare perfect beautiful wonderful amazing favorite special magic golden silver wooden
    plastic paper glass broken single double other same first last best next early late easy hard safe dangerous
    free classic traditional ordinary typical everyday charming elegant friendly curious noisy juicy tasty salty
    spicy bitter ripe raw cooked frozen burning glowing spinning flying running jumping sitting standing smiling
    waiting moving floating hanging
"""
SCENES = """in the sky|at night|on a table|with a smile|in winter|in summer|for children|in the garden|by the sea
in the city|on the road|for you|at home|in the rain|on a sunny day|in the morning|at the beach|at a party
in the kitchen|in the mountains|near the river|under a tree|on the street|at school|at work|for my friend
from above|in the snow|on the wall|in a box|with friends|in my room|for dinner|at the window|on holiday
in spring|in autumn|after lunch|before bed|in the evening|up close|far away"""
STOP_WORDS = frozenset(
    re.findall(r"\w+", "a an the of in on at with and or so that is are it its to for by from my your this who has as be")
)
VOWELS = tuple("aeiou")


def split_list(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


def content_words(text: str) -> list[str]:
    """Lower-case words without articles, prepositions and the like, in order."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in STOP_WORDS]


class LeakCheck:
    """Finds captions that contain all content words of a benchmark sentence, in their order, whatever stands between."""

    def __init__(self, sentences: list[str]):
        self.by_last_word = defaultdict(list)
        for sentence in sentences:
            words = content_words(sentence)
            self.by_last_word[words[-1]].append(words)

    def __call__(self, caption: str) -> bool:
        words = content_words(caption)
        candidates = [sentence for word in set(words) for sentence in self.by_last_word.get(word, ())]
        return any(self.contains(words, sentence) for sentence in candidates)

    @staticmethod
    def contains(words: list[str], sentence: list[str]) -> bool:
        rest = iter(words)
        return all(word in rest for word in sentence)


def keywords_of(icons: Icons, work_dir: Path) -> list[list[str]]:
    """Keywords of each object: those of emojilib and of Unicode's CLDR, whose short name is one of them."""
    folder = work_dir / "npm"
    lists = defaultdict(list)
    for emoji, words in json.loads(npm_file("emojilib@4.0.3", "dist/emoji-en-US.json", folder).read_text("utf-8")).items():
        lists[emoji.replace("\ufe0f", "")] += words
    for kind in ("annotations", "annotationsDerived"):
        package = "cldr-annotations-full@48.2.0" if kind == "annotations" else "cldr-annotations-derived-full@48.2.0"
        tables = json.loads(npm_file(package, f"{kind}/en/annotations.json", folder).read_text("utf-8"))
        for emoji, words in tables[kind]["annotations"].items():
            lists[emoji.replace("\ufe0f", "")] += [*words.get("default", ()), *words.get("tts", ())]
    keywords = []
    for emoji in icons.emoji:
        words = {re.sub("[_-]", " ", word).replace("’", "'").lower().strip() for word in lists.get(emoji, ())}
        keywords.append(sorted(word for word in words if re.fullmatch("[a-z0-9' ]{2,40}", word)))
    return keywords


def colours_of(images: torch.Tensor) -> list[list[str]]:
    """The colours that make up at least a quarter of each icon, white left out: it is the background."""
    palette = torch.tensor(list(PALETTE.values())) / 255
    nearest = torch.cdist(images.flatten(2).transpose(1, 2), palette.expand(len(images), -1, -1)).argmin(2)
    count = F.one_hot(nearest, len(PALETTE)).sum(1)[:, :-1].float()
    return [[c for c, s in zip(PALETTE, share) if s >= 0.25] for share in count / count.sum(1, keepdim=True).clamp(min=1)]


def with_article(words: str) -> str:
    if words.endswith("s") and not words.endswith("ss"):
        return words
    return f"{'an' if words.startswith(VOWELS) else 'a'} {words}"


class Captions:
    """
    Random captions of objects in a style.

    Args:
        names (`list[str]`): One for each object.
        keywords (`list[list[str]]`): Of each object.
        colours (`list[list[str]]`): Of each object, when it is drawn in colour.
        sentences (`list[str]`): Benchmark sentences, which no caption may contain.
    """

    def __init__(
        self, names: list[str], keywords: list[list[str]], colours: list[list[str]], sentences: list[str] | None = None
    ):
        self.names, self.colours = names, colours
        self.leaks = LeakCheck(list(json.loads(BENCHMARK.read_text())) if sentences is None else sentences)
        taken = set(names)  # a keyword that is another object's name would be a wrong caption
        keywords = [[word for word in words if word not in taken] for words in keywords]
        count = Counter(word for words in keywords for word in words)
        self.keywords = [[word for word in words if count[word] <= 12] for words in keywords]
        self.weights = [[1 / count[word] for word in words] for words in self.keywords]  # rare words say more
        self.categories = [[word for word in words if count[word] > 12] for words in keywords]  # too common to stand alone
        self.unspoken = {row for row, name in enumerate(names) if self.leaks(name)}  # told by their keywords alone
        # objects that may be one of several in a caption
        self.short = torch.tensor([len(name) <= MAX_NAME and row not in self.unspoken for row, name in enumerate(names)])
        self.adjectives = ADJECTIVES.split()
        self.things, self.words, self.scenes = (split_list(text) for text in (ABOUT_A_THING, ABOUT_A_WORD, SCENES))

    def draw(self, rows: list[int], style: int, rng: random.Random, name_share: float, styled: bool | None = None) -> str:
        """
        A caption of the objects `rows`, one or several side by side, left to right: with probability `name_share` plain
        names, else a sentence.

        Args:
            styled (`bool`, *optional*): Whether it names the style; unless given, always but for flat, then one in four.
        """
        styled = (rng.random() < 0.25 if style == 0 else True) if styled is None else styled
        while True:
            plain = rng.random() < name_share and rows[0] not in self.unspoken
            if len(rows) > 1:
                caption = self.several(rows, plain, rng)
            else:
                caption = self.names[rows[0]] if plain else self.sentence(rows[0], style, rng)
            caption = self.in_style(caption, style, rng) if styled else caption
            if len(caption.encode()) <= MAX_BYTES[len(rows)] and not self.leaks(caption):
                return caption

    def together(self, rows: list[int]) -> bool:
        """Whether a caption may name these objects side by side: their names may be the words of a benchmark sentence."""
        return not self.leaks(" ".join(self.names[row] for row in rows))

    @staticmethod
    def in_style(caption: str, style: int, rng: random.Random | None = None) -> str:
        """The caption with a phrase that asks for the style: a random one, or the first unless there is an `rng`."""
        phrases = STYLE_PHRASES[STYLES[style]]
        if rng is None:
            return f"{caption}, {phrases[0]}"
        phrase, kind = rng.choice(phrases), rng.random()
        if kind < 0.2 and not phrase.startswith(("in ", "as ", "rendered")):
            return f"{phrase} {caption}"
        return f"{caption}, {phrase}" if kind < 0.7 else f"{caption} {phrase}"

    @staticmethod
    def named(name: str, style: int) -> str:
        """The plainest caption of an object in a style: its name, which alone means flat."""
        return Captions.in_style(name, style) if style else name

    def several(self, rows: list[int], plain: bool, rng: random.Random) -> str:
        things = [self.names[row] if plain else with_article(self.names[row]) for row in rows]
        templates = ["{x} and {y}", "{x} and {y} and {z}"] if plain else [SEVERAL[2], SEVERAL[3]]
        return rng.choice(templates[len(rows) - 2].split("|")).format(**dict(zip("xyz", things)))

    def sentence(self, row: int, style: int, rng: random.Random) -> str:
        """A sentence about the object: with its name, two in three of them, or with keywords alone."""
        name, words = self.names[row], self.keywords[row]
        # all keywords in a random order, the heavier the earlier (Efraimidis and Spirakis, 2006)
        keys = [rng.random() ** (1 / weight) for weight in self.weights[row]]
        words = [word for _, word in sorted(zip(keys, words), reverse=True)]
        about_a_word = bool(words) and rng.random() < 0.45
        noun = rng.choice(words) if words and rng.random() < 0.15 else name
        adjective = rng.choice(self.adjectives)
        if self.colours[row] and style != STYLES.index("high contrast") and rng.random() < 0.3:
            adjective = rng.choice(self.colours[row])
        words = [*words, *rng.sample(self.categories[row], len(self.categories[row])), *[name] * 3]
        category = rng.choice(self.categories[row] or words)
        template = rng.choice(self.words if about_a_word else self.things)
        if template.count("{l}") + template.count("{m}") >= len(self.keywords[row]):
            template = "{k}"
        return template.format(
            x=with_article(noun),
            n=noun,
            j=with_article(f"{adjective} {noun}"),
            a=adjective,
            k=words[0],
            l=words[1],
            m=words[2],
            c=category,
            s=rng.choice(self.scenes),
        )

    def check(self, count: int = 5000):
        """
        Raises:
            ValueError: If one of `count` random captions contains a benchmark sentence.
        """
        rng, short = random.Random(0), self.short.nonzero().flatten().tolist()
        for _ in range(count):
            rows = [rng.randrange(len(self.names))] if rng.random() < 0.8 else rng.choices(short, k=rng.choice([2, 3]))
            caption = self.draw(rows, rng.randrange(len(STYLES)), rng, name_share=0.3)
            if self.leaks(caption):
                raise ValueError(f"The training caption {caption!r} contains a benchmark sentence.")
