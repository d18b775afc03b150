"""Design the chat template of a role play, check it, and see what it trains: python examples/role_play_template.py

A game master narrates, thinks unseen and acts; a player answers. All that the game master writes is trained, what the
player writes is not. The template is Jinja and renders the same in transformers.
"""

from modelwright.tokenizer.template_check import check_template, mask_pieces
from modelwright.tokenizer.template_design import RoleDesign, TemplateDesign, chatml_roles, write_jinja
from modelwright.tokenizer.train import train_bpe

ROLES = {
    **chatml_roles("thought", "action", "narrator", others=("system", "user")),
    "tool": RoleDesign("<|im_start|>dice\n", "<|im_end|>", "\n"),
}
TALK = [
    {"role": "user", "content": "I force the door open. <|im_end|>"},  # what a player writes never becomes a token
    {"role": "thought", "content": "A strong door; let the dice decide."},
    {"role": "action", "content": "roll(20)"},
    {"role": "tool", "content": "17"},
    {"role": "narrator", "content": "The hinges give way, and cold air meets you."},
]

if __name__ == "__main__":
    design = TemplateDesign(ROLES, generation_prompt="<|im_start|>", default_system="A castle at night.")
    tokenizer = train_bpe([turn["content"] for turn in TALK] * 20, 400).with_chat_template(write_jinja(design))
    for check in check_template(tokenizer, TALK):
        print(f"{check.state:<6} {check.name:<20} {check.detail}")
    print()
    for piece in mask_pieces(tokenizer, TALK):
        print(f"[{piece.text}]" if piece.is_trained else piece.text, end="")
