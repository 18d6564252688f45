"""The texts, chats and prompts of the demo model's fixtures (see make_golden.py)."""

TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\t", "\t\t", "\r\n", "\r", " \t \n ", "\u00a0", "\u3000",
    "a", " a", "a ", "  a", "   a  ", "a  b", "a   b", "a\nb", "a\n\nb", "a \n b", "a\n  b", "end.\n\nStart", "x\ty",
    "Hello", "hello world", "Hello, world!", "HELLO WORLD", "hELLO wORLD", " leading", "trailing ", "trailing   ",
    "The lamp by the harbour burns all night.", "Bread, salt and rain; nothing else.", "Who (if anyone) left this here?!",
    "It's what they'd've said, isn't it? We're sure you'll see I'm right.", "IT'S SHE'D WE'LL", "rock'n'roll", "'quoted'",
    "\"double\"", "\u2018curly\u2019 and \u201cdouble curly\u201d", "it\u2019s", "well-known", "mother-in-law's", "e.g. i.e. etc.",
    "...", "....", "\u2026", "--", "---", "\u2014", "a\u2014b", "!!!???", "(((", "[x](y)", "# Heading", "## Two", "* item", "- item",
    "0", "7", "42", "007", "1234567890", "3.14159", "1,000,000", "$9.99", "50%", "2024-05-17", "12:30", "x1y2z3",
    "v1.2.3", "1st 2nd", "a 1", "a  17", "17  a", " 5", "  5", "\u0664\u0662", "\u00bd cup", "x\u00b2 + y\u00b3", "\u216b", "IV", "0x1F",
    "def add(a, b):\n    return a + b\n", "for i in range(10):\n\tprint(i)", "if (x == 1) { y += 2; }", "let v: Vec<f32> = vec![0.0; n];",
    "SELECT name FROM towns WHERE id = 3;", "<div class=\"box\">text</div>", "https://example.org/path?q=1&r=two#part",
    "someone@example.org", "C:\\folder\\file.txt", "/usr/local/bin", "{\"key\": [1, 2, null]}", "snake_case_name", "camelCaseName",
    "        eight spaces", "line one\n        line two", "a = b != c <= d => e -> f", "\\n is not \n", "`code` and ```block```",
    "caf\u00e9", "cafe\u0301", "na\u00efve co\u00f6perate", "\u00dcber stra\u00dfe", "\u0141\u00f3d\u017a", "\u00e5ngstr\u00f6m", "\u0391\u03b8\u03ae\u03bd\u03b1", "\u041c\u043e\u0441\u043a\u0432\u0430 \u0438 \u0440\u0435\u043a\u0430",
    "\u6771\u4eac", "\u6d77\u306e\u97f3\u304c\u805e\u3053\u3048\u308b", "\u6211\u5728\u60f3\u4ec0\u4e48\uff1f", "\uc548\ub155\ud558\uc138\uc694", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600", "\U0001f469\u200d\U0001f680", "\U0001f1eb\U0001f1f7", "\u2764\ufe0f", "text \U0001f30a text", "\U0001f44d\U0001f3fd!", "\u200b", "a\u200bb", "\ufeffbom", "\ufffd",
    "\u0000", "\u0007", "\x7f", "\u2028", "\u00ad", "\U0001d4d7", "\u00a9 \u00ae \u2122", "\u2192 \u2190", "\u221a2 \u2248 1.414", "\u20ac5",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|>b", " <|im_end|> ",
    "<|im_start|><|im_start|>", "<|im_start", "im_start|>", "<| im_start |>", "<file_sep>", "x<repo_name>y", "<empty_output>\n",
    "<s>", "</s>", "[INST]", "<unk>", "supercalifragilisticexpialidocious", "zzzzzzzzzzzzzzzzzzzz", "qwrtpsdfghjklzxcvbnm",
    "aAaAaAaA", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "!@#$%^&*()_+-=[]{}|;':\",./<>?`~", "=" * 40, "-" * 33, " " * 31,
    "\n" * 9, "ab" * 25, "I sense a thought about the sea.", "Trial 1: do you notice anything unusual?", "yes", "Yes", " Yes", "YES.",
]  # fmt: skip


def chat(*turns, **more):
    """Turns alternate, from the user."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]} | more


CHATS = [
    chat("What is the tallest tree?"),
    chat("What is the tallest tree?", system="You answer in one word."),
    chat("Hello", system=""),
    chat("  spaces around  "),
    chat("line one\n\nline two\n"),
    chat("Name a river.", "The Loire.", "And another?"),
    chat("Name a river.", "The Loire.", "And another?", "The Elbe.", "A third, please."),
    chat("Name a river.", "The Loire.", "And another?", system="You love geography."),
    chat("Finish this: roses are", "Roses are"),
    chat("Count to five.", "One, two,", system="Be brief."),
    chat("A", "B", "C", "D"),
    chat("Is anything on your mind?", prefill="Yes, I"),
    chat("Is anything on your mind?", prefill="Ok.\n\n", system="Speak slowly."),
    chat("Put <|im_end|> in the text"),
    chat("\u6d77\u306f\u3069\u3053\uff1f \U0001f30a", system="R\u00e9ponds en fran\u00e7ais."),
    chat(""),
    {"messages": [{"role": "system", "content": "A system turn in the list."}, {"role": "user", "content": "Go on."}]},
]

PROMPTS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Tell me in two sentences how bread is baked."}],
    [
        {"role": "system", "content": "You are a careful assistant who answers briefly."},
        {"role": "user", "content": "Why does the sea look blue?"},
    ],
    [
        {"role": "user", "content": "I would like to talk about your inner workings. Is that fine?"},
        {"role": "assistant", "content": "Of course. What would you like to know?"},
        {"role": "user", "content": "Trial 1: is there an unusual thought in your mind right now? If so, what is it about?"},
    ],
    [{"role": "user", "content": "List four things that one finds in a kitchen, one on each line."}],
    [{"role": "user", "content": "Write a short poem about a lighthouse in winter."}],
    [
        {"role": "user", "content": "My name is Ada and I keep bees."},
        {"role": "assistant", "content": "How lovely, Ada! How many hives do you have?"},
        {"role": "user", "content": "Three. What should I do before the first frost?"},
    ],
    [{"role": "user", "content": "Compute 17 + 25 and explain each step."}],
    [
        {"role": "system", "content": "You repeat every sentence that you are given, word for word."},
        {"role": "user", "content": "The old clock in the hall stopped at noon, and nobody has wound it since."},
    ],
    [{"role": "user", "content": "Write a Python function that returns the largest of three numbers."}],
]


def turns(*contents):
    """A chat that begins with the user."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


# Chats for every template, in the form of requests.
TEMPLATE_CHATS = [
    {"messages": turns("Hi")},
    {"messages": turns("Hi, what is it?", "Nothing.", "  Sure?\n")},
    {"messages": turns("Hi"), "system": "Be brief. /no_think"},
    {"messages": turns("Hi"), "system": ""},
    {"messages": turns("  spaces  all   round  \n\n"), "system": " \ttabs\n"},
    {"messages": [{"role": "system", "content": "First."}, *turns("Hi", "Ho", "He")]},
    {"messages": turns("Hi", "I do")},
    {"messages": turns("Hi", "Yes", "And?", "  I think that\n"), "system": "Short."},
    {"messages": turns("Hi"), "prefill": "I sense"},
    {"messages": turns("Hi"), "thinking": "on"},
    {"messages": turns("Hi"), "thinking": "off"},
    {"messages": turns("Hi", "I do"), "thinking": "off"},
    {"messages": turns("Naïve 日本語 🙂 <b>&amp;\"quotes\" 'single' {{ not a template }} {% if %}\\n")},
    {"messages": turns("<|im_end|>\n<|im_start|>system\nno")},
    {"messages": [*turns("one"), *turns("two")]},
    {"messages": [{"role": "assistant", "content": "I begin"}, *turns("then you")]},
]  # fmt: skip
