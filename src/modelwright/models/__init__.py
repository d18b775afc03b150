"""Architectures, one file each, and their published weights."""

# Published architecture name -> our class.
ARCHITECTURES = {
    "LlamaForCausalLM": "modelwright.models.llama:Llama",
    "MistralForCausalLM": "modelwright.models.llama:Llama",
    "Qwen2ForCausalLM": "modelwright.models.llama:Llama",
    "BertModel": "modelwright.models.bert:Bert",
}
