"""Ask a trained folder whether two sentences say the same.

python examples/use_model.py runs/mrpc "Shares rose 3 percent on Monday." "On Monday, shares climbed 3 percent."
"""

import argparse

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what --output_dir was")
    parser.add_argument("sentence1")
    parser.add_argument("sentence2")
    args = parser.parse_args()

    classify = pipeline("text-classification", model=args.model)
    answer = classify({"text": args.sentence1, "text_pair": args.sentence2})
    print(f"{answer['label']} ({answer['score']:.3f})")


if __name__ == "__main__":
    main()
