"""The texts with which a model is asked for training data. Plain texts to read and change; the code only fills them in.

Names in braces are filled in by the caller. What a person or a model wrote is put between lines of three angle marks,
so that a reader, and a model, can tell it from what is asked.

Source: Wang et al. 2023, arXiv:2212.10560, tables 5 to 8 (Self-Instruct); Xu et al. 2023, arXiv:2304.12244, appendix A
to E (Evol-Instruct); Zheng et al. 2023, arXiv:2306.05685 (a judge, pairs in both orders). Shortened, for small models.
"""

NEW_TASKS = """\
Come up with new tasks, each of another kind than the ones below. A task is one instruction, to be answered in text.

{examples}

Write {num} new tasks. Begin each with its number, as above."""

ANSWER_TASK = """\
Do this task. Give the answer alone, without any word before or after it.

<<<
{instruction}
>>>"""

ANSWER_WITH_EXAMPLES = """\
{examples}

Do the next task in the same way. Give the answer alone.

<<<
{instruction}
>>>"""

EVOLVE = """\
Rewrite the task below into a slightly harder one. {how} The new task must make sense, be understood by people and be
answered in text. Add at most twenty words. Write the new task alone.

<<<
{instruction}
>>>"""

EVOLVE_BROAD = """\
Write a brand new task of the same field as the one below, but rarer. It must be about as long and about as hard. Write
the new task alone.

<<<
{instruction}
>>>"""

# Evol-Instruct's ways to make a task harder; the last one makes it wider instead.
WAYS = {
    "constraint": "Add one more condition or requirement.",
    "deepen": "If it asks about something, ask about it in more depth and breadth.",
    "concrete": "Replace general terms by more specific ones.",
    "steps": "If it can be solved by a few simple steps, ask for something that needs more steps.",
    "broad": "",
}

ASK_ABOUT = """\
Read the passage and write {num} questions that it answers, each with a short answer and the words of the passage that
say so, copied exactly. Use this form for each:

Question: ...
Answer: ...
Quote: ...

<<<
{passage}
>>>"""

PLAY_USER = """\
You play a person who talks to an assistant about this: {topic}. Write what the person says next, one or two sentences,
nothing else. The talk so far:

{talk}"""

RATE = """\
How good is this answer? Think of whether it does what is asked, is right, is complete and is clear. Write one line,
"Score: N", with N from 1 (useless) to 5 (excellent).

The task:
<<<
{instruction}
>>>

The answer:
<<<
{answer}
>>>"""

COMPARE = """\
Which of two answers to the task is better? Write one line: "Better: A", "Better: B" or "Better: none".

The task:
<<<
{instruction}
>>>

Answer A:
<<<
{first}
>>>

Answer B:
<<<
{second}
>>>"""

PARAPHRASE = """\
Say this in other words, with the same meaning. Write the new wording alone.

<<<
{text}
>>>"""
