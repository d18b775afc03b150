"""Ask a folder of documents a question and print the answer with its citations.

python examples/ask_documents.py my-docs/ "How do I set the time zone?"
"""

import sys
import tempfile

import modelwright as mw


def main(folder: str, question: str) -> None:
    """Index the folder, ask, and show where each quote stands."""
    with tempfile.TemporaryDirectory() as work:
        index = mw.Index.build(folder, f"{work}/index")
        answer = mw.ask(index, question)
        print(answer.text)
        for citation in answer.citations:
            # A quote is exactly the characters that it points at.
            assert index.document(citation.doc).text[citation.start : citation.end] == citation.quote
            print(f"[{citation.number}] {citation.doc}, characters {citation.start} to {citation.end}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/ask_documents.py FOLDER QUESTION")
    main(*sys.argv[1:])
