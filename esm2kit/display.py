"""What a notebook shows: a figure with its caption, which is also its text for those who cannot see it."""

import matplotlib.pyplot as plt
from IPython.display import Markdown, display
from matplotlib.axes import Axes


def captioned(ax: Axes, caption: str) -> None:
    """Show a figure with a caption below it; the same words become the image's alternative text.

    Args:
        ax: any axes of the figure.
        caption: what the figure shows and what to see in it; Markdown.
    """
    figure = ax.figure
    display(figure, metadata={"image/png": {"alt": caption.replace("*", "").replace("`", "")}})
    display(Markdown(caption))
    plt.close(figure)
