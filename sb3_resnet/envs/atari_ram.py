"""
What bytes of an Atari game's memory mean: positions, lives and scores by name.

The names and addresses are the annotations of AtariARI (Anand et al. 2019, arXiv 1906.08226, table of
``ram_annotations.py`` in ``mila-iqia/atari-representation-learning``), of those games whose state a random player
moves. Lists there became numbered names here.
"""

from __future__ import annotations

from typing import Any

from sb3_resnet.envs.game import AtariGame

#: Address in the 128 bytes of memory by game (as ale-py names its ROM) and name.
ADDRESSES: dict[str, dict[str, int]] = {
    "asteroids": {"player_x": 73, "player_y": 74, "missile_x": 83, "missile_y": 86},
    "bowling": {"ball_x": 30, "ball_y": 41, "player_x": 29, "player_y": 40, "score": 33},
    "boxing": {
        "player_x": 32, "player_y": 34, "enemy_x": 33, "enemy_y": 35,
        "player_score": 18, "enemy_score": 19, "clock": 17,
    },
    "breakout": {"ball_x": 99, "ball_y": 101, "player_x": 72, "blocks_hit": 77, "score": 84},
    "demon_attack": {
        "player_x": 22, "missile_y": 21, "enemy_x_1": 17, "enemy_x_2": 18, "enemy_x_3": 19,
        "enemy_y_1": 69, "enemy_y_2": 70, "enemy_y_3": 71,
    },
    "freeway": {"player_y": 14, "score": 103, **{f"car_x_{lane}": 108 + lane for lane in range(10)}},
    "frostbite": {
        "player_x": 102, "player_y": 100, "bear_x": 104, "igloo_blocks": 77,
        "ice_x_1": 34, "ice_x_2": 33, "ice_x_3": 32, "ice_x_4": 31,
    },
    "hero": {"player_x": 27, "player_y": 31, "power": 43, "dynamite": 50},
    "ms_pacman": {
        "player_x": 10, "player_y": 16, "dots_eaten": 119,
        "sue_x": 6, "sue_y": 12, "inky_x": 7, "inky_y": 13, "pinky_x": 8, "pinky_y": 14, "blinky_x": 9, "blinky_y": 15,
    },
    "pong": {
        "player_y": 51, "enemy_y": 50, "ball_x": 49, "ball_y": 54, "player_score": 14, "enemy_score": 13,
    },
    "qbert": {"player_x": 43, "player_y": 67, "player_column": 35, "red_enemy_column": 69, "green_enemy_column": 105},
    "riverraid": {"player_x": 51, "missile_x": 117, "missile_y": 50, "fuel_high": 55, "fuel_low": 56},
    "seaquest": {
        "player_x": 70, "player_y": 97, "missile_x": 103, "oxygen": 102, "divers": 62,
        **{f"obstacle_x_{lane}": 30 + lane for lane in range(4)},
    },
    "space_invaders": {"player_x": 28, "enemies_x": 26, "enemies_y": 24, "missiles_y": 9, "invaders_left": 17},
    "tennis": {"player_x": 26, "player_y": 24, "enemy_x": 27, "enemy_y": 25, "ball_x": 16, "ball_y": 17},
    "video_pinball": {"ball_x": 67, "ball_y": 68, "left_paddle_y": 98, "right_paddle_y": 102},
    "yars_revenge": {
        "player_x": 32, "player_y": 31, "missile_x": 38, "missile_y": 37, "enemy_x": 43, "enemy_y": 42,
    },
}  # fmt: skip


def ram_labels(env: Any) -> dict[str, float]:
    """
    Read the annotated bytes of one game.

    :param env: a gymnasium environment, wrapped or not
    :return: value by name, 0 to 255; empty for other environments and for games without annotations
    :raises ValueError: for a game in C++, whose memory cannot be read
    """
    inner = env.unwrapped
    game = inner.spec.kwargs.get("game") if inner.spec is not None else None
    if game not in ADDRESSES:
        return {}
    if isinstance(inner, AtariGame):
        raise ValueError(
            "The memory of games in C++ (make_atari_vec_env) cannot be read: make them with make_atari_env, or write "
            "labels=lambda env: {}"
        )
    if not hasattr(inner, "ale"):  # another emulation, of the same name
        return {}
    memory = inner.ale.getRAM()
    return {name: float(memory[address]) for name, address in ADDRESSES[game].items()}
