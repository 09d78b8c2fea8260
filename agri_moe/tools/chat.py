"""`chat`: a page in the browser that answers scenarios."""

import importlib.util
import os
import socket


def chat(
    model: str,
    port: int = 7860,
    max_new_tokens: int = 512,
    max_thought_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    device: str = "auto",
) -> None:
    """Open a page, in Hindi, that answers scenarios from a form or in a farmer's own words; Ctrl+C closes it.

    Only this machine can reach it, under http://127.0.0.1:PORT. Several visitors may ask at once: they are answered in
    turn. No substitute for an agronomist, which the page says too.

    Example: python main.py chat --model advisor

    Args:
        model: Exported folder, hub name, or a run's checkpoint (.ckpt).
        port: Where the page is.
        max_new_tokens: Answers are cut off after so many tokens.
        max_thought_tokens: A thought is closed after so many tokens, and the advisory begins; no limit by default.
        temperature: 0 is greedy; otherwise sampling at this temperature.
        top_p: As with `generate`.
        top_k: As with `generate`.
        device: cpu, cuda, or auto.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('chat needs gradio, which is not here: pip install "agri-moe[chat]".')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio and its client read it when they are imported
    check_free(port)

    from agri_moe.answering import load
    from agri_moe.chat_page import Advisor, build_page, serve
    from agri_moe.generation import Decoding

    decoding = Decoding(max_new_tokens, max_thought_tokens, temperature, top_p, top_k)
    network, format, _ = load(model, "own", device)
    page = build_page(Advisor(network, format, decoding))
    print(f"http://127.0.0.1:{port}  (Ctrl+C closes it)", flush=True)
    serve(page, port)


def check_free(port: int) -> None:
    """Refuse a port that cannot be had, before a model is loaded."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port is {port}: it must be between 1 and 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"--port {port} cannot be used ({error.strerror}); name another.") from error
