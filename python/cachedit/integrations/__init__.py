"""What engines that embed this package need: vLLM-Omni and SGLang."""
